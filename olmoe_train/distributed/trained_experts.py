"""trainer.train_only: some experts are trained, and every other weight keeps its bits.

The experts of a layer are one parameter, so the frozen ones of a layer with trained experts have a gradient,
which is set to 0 where the backward pass makes it. Gradient norm and clipping are therefore those of the
trained experts, in every layout, and an optimizer without weight decay leaves the frozen ones as they are: an
update of moments that are 0 is 0.

Shapes: E experts of this rank.
"""

import torch

from olmoe_train.config.expert_file import NamedExperts
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.roles import role_of


def freeze_all_but(model: OlmoeForCausalLM, named: NamedExperts) -> None:
    """Freeze every parameter but the experts of the layers that `named` names, and the roles of `also`.

    Args:
        model: The model, before `parallelize`.
        named: What is trained.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(role_of(name) in named.also)
    for layer in named.layers:
        model.decoder_layers[layer].mlp.experts.requires_grad_(True)


def mask_frozen_experts(model: OlmoeForCausalLM, named: NamedExperts, mesh: Mesh) -> None:
    """Set the gradients of the other experts of these layers to 0, in every backward pass.

    Args:
        model: The model, after `parallelize`.
        named: What is trained.
        mesh: Says which experts this rank computes.
    """
    total = model.config.num_experts
    rank, ranks = 0, 1
    if mesh.expert is not None:
        rank, ranks = mesh.expert["expert"].get_local_rank(), mesh.expert["expert"].size()
    first = rank * (total // ranks)
    for layer, trained in named.layers.items():
        is_frozen_E = [first + expert not in trained for expert in range(total // ranks)]
        model.decoder_layers[layer].mlp.experts.frozen_E = torch.tensor(is_frozen_E, device=mesh.device)


def trained_summary(model: OlmoeForCausalLM, named: NamedExperts) -> str:
    """What is trained, in a line for the log."""
    experts = sum(map(len, named.layers.values()))
    of_one = sum(p.shape[1:].numel() for p in model.decoder_layers[0].mlp.experts.parameters())
    others = sum(p.numel() for name, p in model.named_parameters() if role_of(name) in named.also)
    trained, total = experts * of_one + others, sum(p.numel() for p in model.parameters())
    also = f" and {', '.join(role.value for role in named.also)}" if named.also else ""
    return (
        f"{experts} experts in {len(named.layers)} layers{also} are trained, {trained:,} parameters "
        f"({trained / total:.1%} of the model)"
    )
