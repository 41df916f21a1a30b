"""What the losses and the metrics read of a router: sums over tokens, made where the logits are made.

Shapes: T tokens, B sequences, S positions (T = B x S), E experts, K top-k, L layers (1 for the sums of one
router).

The sums are small, so nothing of size T leaves a layer in training. Activation checkpointing therefore keeps
nothing for the router losses. Sums over the parts of a batch add up to the sums over the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class RouterStats(NamedTuple):
    """Sums over unpadded tokens, fp32 (fp64 for fp64 logits).

    A named tuple, not a dataclass: FSDP2 and DeepSpeed look for tensors in tuples.
    """

    counts_LE: Tensor
    """Tokens sent to each expert, without gradient; exact up to 2^24 tokens per expert."""
    probabilities_LE: Tensor
    """Softmax probability of each expert."""
    squared_logsumexp_L: Tensor
    """logsumexp(logits)^2, of which the router z-loss is the mean."""
    entropy_L: Tensor
    """Entropy of the softmax in nats, without gradient; ln(E) per token if routing is uniform."""
    sequence_products_L: Tensor | None = None
    """Sum over sequences of sum_e c_e p_e / t: of one sequence, c_e is the number of tokens sent to expert e,
    p_e the sum of its probabilities, and t the number of tokens. The sequence-wise loss is a multiple of it.
    None: the balancer has no such loss."""


def router_stats(
    logits_TE: Tensor,
    probs_TE: Tensor,
    expert_indices_TK: Tensor,
    token_mask_T: Tensor | None = None,
    sequences: int | None = None,
) -> RouterStats:
    """Sum what one router computed.

    Args:
        logits_TE: Router logits, fp32 or fp64.
        probs_TE: Their softmax.
        expert_indices_TK: int64, the experts that process each token.
        token_mask_T: 0 at padding, in the dtype of the logits; None counts every token.
        sequences: B, of equal length, one after the other; None leaves `sequence_products_L` out.

    Returns:
        The sums of one layer (L = 1).
    """
    squared_T = _LogSumExp.apply(logits_TE, probs_TE).square()
    with torch.no_grad():
        entropy_T = torch.special.entr(probs_TE).sum(-1)
        counts_1E = expert_counts([expert_indices_TK], probs_TE.shape[-1], token_mask_T)
    # L = 1 by keepdim, not by unsqueeze: FSDP2 wants no view among the outputs of a layer.
    if token_mask_T is None:
        probabilities_1E = probs_TE.sum(0, keepdim=True)
    else:
        probabilities_1E = token_mask_T[None] @ probs_TE
        squared_T, entropy_T = token_mask_T * squared_T, token_mask_T * entropy_T
    products_1 = None
    if sequences is not None:
        products_1 = _sequence_products(probs_TE, expert_indices_TK, token_mask_T, sequences)
    return RouterStats(
        counts_1E,
        probabilities_1E,
        squared_T.sum(0, keepdim=True),
        entropy_T.sum(0, keepdim=True),
        products_1,
    )


def stack_layers(layers: Sequence[RouterStats]) -> RouterStats:
    """Put the sums of several layers into one RouterStats, in their order."""
    stacked = {
        name: torch.cat([getattr(layer, name) for layer in layers])
        for name in RouterStats._fields
        if getattr(layers[0], name) is not None
    }
    return RouterStats(**stacked)


def _sequence_products(
    probs_TE: Tensor, expert_indices_TK: Tensor, token_mask_T: Tensor | None, sequences: int
) -> Tensor:
    """RouterStats.sequence_products_L of one layer, [1]. Nothing of size T is made but an index of [T, K]."""
    experts = probs_TE.shape[-1]
    probs_BSE = probs_TE.view(sequences, -1, experts)
    with torch.no_grad():
        mask_T = probs_TE.new_ones(1).expand(len(probs_TE)) if token_mask_T is None else token_mask_T
        sequence_T = torch.arange(len(probs_TE), device=probs_TE.device) // probs_BSE.shape[1]
        places_TK = sequence_T[:, None] * experts + expert_indices_TK
        counts_BE = probs_TE.new_zeros(sequences * experts)
        counts_BE.scatter_add_(0, places_TK.flatten(), mask_T[:, None].expand_as(places_TK).flatten())
        tokens_B1 = mask_T.view(sequences, -1).sum(1, keepdim=True).clamp(min=1)
        load_BE = counts_BE.view(sequences, experts) / tokens_B1
    if token_mask_T is None:
        sums_BE = probs_BSE.sum(1)
    else:
        sums_BE = (token_mask_T.view(sequences, 1, -1) @ probs_BSE).squeeze(1)
    return (load_BE * sums_BE).view(1, -1).sum(1)


def expert_counts(expert_indices: Sequence[Tensor], num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """Count the tokens per layer and expert.

    Args:
        expert_indices: One [T, K] int64 tensor per layer.
        num_experts: E.
        mask_T: 0 at padding; None counts every token.

    Returns:
        fp32 [L, E] without gradient, exact up to 2^24 tokens per expert.
    """
    counts = []
    for indices_TK in expert_indices:
        weight_TK = torch.ones(1, device=indices_TK.device) if mask_T is None else mask_T[:, None].float()
        # scatter_add, not bincount: on CUDA, bincount copies the maximum index to the host.
        zeros_E = torch.zeros(num_experts, device=indices_TK.device)
        counts.append(
            zeros_E.scatter_add_(0, indices_TK.reshape(-1), weight_TK.expand(indices_TK.shape).reshape(-1))
        )
    return torch.stack(counts)


class _LogSumExp(torch.autograd.Function):
    """logsumexp(logits) over the experts.

    The gradient of logsumexp is the softmax, which autograd keeps for the routing weights in any case.
    torch.logsumexp would keep the logits, too: 4 E bytes per token.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
        ctx.save_for_backward(probs_TE)
        return logits_TE.logsumexp(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_logsumexp_T: Tensor) -> tuple[Tensor, None]:
        (probs_TE,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return d_logsumexp_T[:, None] * probs_TE, None
