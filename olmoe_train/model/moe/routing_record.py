"""Record which experts each token goes to, and make a later pass send the tokens to the same experts.

Sampling with a key/value cache and a training pass over the same tokens differ by rounding, and a near-tie
between two experts can then go either way. Replayed, both passes use the same experts; the routing weights
stay the probabilities of the later pass.

Shapes: T tokens, E experts, K top-k, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.block import Choose

OWN_CHOICE = -1
"""Entry of a record for a token whose experts the router chooses itself."""


@contextmanager
def record_routing(model: OlmoeForCausalLM) -> Iterator[list[list[Tensor]]]:
    """Record the experts of every token in the forward passes within the block.

    Yields:
        For each layer a list with one entry per forward pass: int64 [T, K], in the order of the scores.
    """
    passes_L: list[list[Tensor]] = [[] for _ in model.decoder_layers]
    with _replaced_choices(model, lambda choose, layer: partial(_recorded, choose, passes_L[layer])):
        yield passes_L


@contextmanager
def _replaced_choices(
    model: OlmoeForCausalLM, replacement: Callable[[Choose, int], Choose]
) -> Iterator[None]:
    """Within the block the router of each layer chooses experts with replacement(its own choice, layer)."""
    routers = [layer.mlp.gate for layer in model.decoder_layers]
    before: list[Choose] = [router.select_experts for router in routers]
    for layer, (router, choose) in enumerate(zip(routers, before, strict=True)):
        router.select_experts = replacement(choose, layer)
    try:
        yield
    finally:
        for router, choose in zip(routers, before, strict=True):
            router.select_experts = choose


def _recorded(choose: Choose, passes: list[Tensor], scores_TE: Tensor, top_k: int) -> Tensor:
    indices_TK = choose(scores_TE, top_k)
    passes.append(indices_TK)
    return indices_TK


@contextmanager
def replay_routing(
    model: OlmoeForCausalLM, indices_LTK: Tensor, replay: bool = True
) -> Iterator[list[Tensor]]:
    """Send the tokens of the forward pass within the block to the experts of a record.

    Args:
        model: Makes one forward pass of T tokens within the block, on this rank.
        indices_LTK: int64, on the model's device. A token with OWN_CHOICE keeps the router's choice.
        replay: False only compares the router's choice with the record.

    Yields:
        One fp32 pair per layer: how many choices of the record the router makes itself, and all choices.
    """
    assert len(indices_LTK) == len(model.decoder_layers)
    agreements: list[Tensor] = []
    with _replaced_choices(
        model, lambda choose, layer: partial(_replayed, choose, indices_LTK[layer], replay, agreements)
    ):
        yield agreements


def _replayed(
    choose: Choose,
    indices_TK: Tensor,
    replay: bool,
    agreements: list[Tensor],
    scores_TE: Tensor,
    top_k: int,
) -> Tensor:
    own_TK = choose(scores_TE, top_k)
    same_TK = (own_TK[:, :, None] == indices_TK[:, None, :]).any(-1)
    is_recorded_TK = indices_TK != OWN_CHOICE
    agreements.append(torch.stack([same_TK.sum(), is_recorded_TK.sum()]).float())
    return torch.where(is_recorded_TK, indices_TK, own_TK) if replay else own_TK
