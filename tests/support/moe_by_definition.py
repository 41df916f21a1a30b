"""The MoE block as its definition states it, computed per token and per expert.

The tests of the MoE block compare with this module. Nothing here is sorted, fused or batched, so little can
be wrong. Training never uses this module.

Shapes: T tokens, D hidden, F expert width, E experts, K top-k.
"""

import torch
from torch import Tensor

from olmoe_train.model.activations import ACTIVATIONS


def moe_block(
    x_TD: Tensor,
    router_ED: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    top_k: int,
    norm_topk_prob: bool = False,
    hidden_act: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the MoE block per token and per expert. Source: arXiv 2409.02060, section 2, equations 1 and 2.

    All float inputs have the same dtype, which may be any float dtype. Plain autograd differentiates the
    result with respect to every input.

    Returns:
        Output [T, D], router logits [T, E] and the selected experts [T, K] int64, most probable first.
    """
    activation = ACTIVATIONS[hidden_act]
    outputs, logits, choices = [], [], []
    for x_D in x_TD:
        logits_E = router_ED @ x_D
        probability_E = logits_E.softmax(0)
        chosen = sorted(range(len(logits_E)), key=lambda e: -probability_E[e].item())[:top_k]
        total = torch.stack([probability_E[e] for e in chosen]).sum()
        output_D = torch.zeros_like(x_D)
        for expert in chosen:
            weight = probability_E[expert] / total if norm_topk_prob else probability_E[expert]
            inner_F = activation(gate_EFD[expert] @ x_D) * (up_EFD[expert] @ x_D)
            output_D = output_D + weight * (down_EDF[expert] @ inner_F)
        outputs.append(output_D)
        logits.append(logits_E)
        choices.append(chosen)
    return torch.stack(outputs), torch.stack(logits), torch.tensor(choices, device=x_TD.device)
