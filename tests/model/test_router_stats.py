"""The routers' sums: by hand, against the logits, and what autograd keeps for them."""

import math

import pytest
import torch
from torch import Tensor

from olmoe_train.model.losses import router_losses, router_losses_from_stats
from olmoe_train.model.moe.router_stats import RouterStats, router_stats, stack_layers

TOKENS, EXPERTS, TOP_K, LAYERS = 12, 6, 2, 3


def test_sums_by_hand_without_padding() -> None:
    # (3/4, 1/4): logsumexp ln 4, entropy ln 4 - 3/4 ln 3 = 0.562335. The second token is padding.
    logits = torch.tensor([[math.log(3.0), 0.0], [50.0, -50.0]])
    sums = router_stats(logits, logits.softmax(-1), torch.tensor([[0], [1]]), torch.tensor([1.0, 0.0]))
    assert sums.counts_LE.tolist() == [[1.0, 0.0]]
    assert sums.probabilities_LE[0].tolist() == pytest.approx([0.75, 0.25])
    assert sums.squared_logsumexp_L.item() == pytest.approx(math.log(4.0) ** 2)
    assert sums.entropy_L.item() == pytest.approx(0.5623351446)


def routed(masked: bool) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(TOKENS, EXPERTS, generator=generator) for _ in range(LAYERS)]
    mask = (torch.arange(TOKENS) % 3 > 0).float() if masked else None
    return logits, [layer.topk(TOP_K).indices for layer in logits], mask


def stats_of(logits: list[Tensor], indices: list[Tensor], mask: Tensor | None) -> RouterStats:
    layers = zip(logits, indices, strict=True)
    return stack_layers([router_stats(one, one.softmax(-1), chosen, mask) for one, chosen in layers])


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_formulas(masked: bool) -> None:
    """LB and Z in plain operations: mean_l E/(T K) sum_e c p, and mean_lt logsumexp^2."""
    logits, indices, mask = routed(masked)
    logits = [layer.double().requires_grad_() for layer in logits]
    weight_T = torch.ones(TOKENS, dtype=torch.float64) if mask is None else mask.double()
    tokens = weight_T.sum()
    expected = torch.zeros((), dtype=torch.float64)
    for layer, chosen in zip(logits, indices, strict=True):
        p_E = (weight_T[:, None] * torch.exp(layer) / torch.exp(layer).sum(-1, keepdim=True)).sum(0) / tokens
        one_hot_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, chosen, 1.0)
        c_E = (weight_T[:, None] * one_hot_TE).sum(0)
        expected = expected + EXPERTS / (tokens * TOP_K) * (c_E * p_E).sum() / LAYERS
        expected = expected + (weight_T * torch.exp(layer).sum(-1).log() ** 2).sum() / (LAYERS * tokens)
    wanted = torch.autograd.grad(expected, logits)
    stats = stats_of(logits, indices, None if mask is None else mask.double())
    balance, z = router_losses_from_stats(stats, TOP_K)
    torch.testing.assert_close(balance + z, expected)
    for found, by_hand in zip(torch.autograd.grad(balance + z, logits), wanted, strict=True):
        torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("convention", ["olmoe", "olmoe_0924", "hf", "megatron"])
def test_sums_of_the_parts_give_the_losses_of_the_whole(convention: str) -> None:
    logits, indices, mask = routed(masked=True)
    assert mask is not None
    parts = [
        stats_of([x[rows] for x in logits], [i[rows] for i in indices], mask[rows])
        for rows in (slice(0, 5), slice(5, TOKENS))
    ]
    added = RouterStats(*(a + b for a, b in zip(*(part[:4] for part in parts), strict=True)))
    expected = router_losses(logits, indices, EXPERTS, mask, convention)
    torch.testing.assert_close(router_losses_from_stats(added, TOP_K, convention), expected)


def test_autograd_keeps_the_probabilities_and_one_number_per_token() -> None:
    """4 E bytes for the softmax, which the routing weights need in any case, and 4 for logsumexp."""
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        probs = logits.softmax(-1)
        stats = router_stats(logits, probs, logits.detach().topk(TOP_K).indices)
    assert stats.probabilities_LE.requires_grad
    assert not stats.entropy_L.requires_grad
    assert not stats.counts_LE.requires_grad
    assert sum(kept.values()) == 4 * TOKENS * (EXPERTS + 1)
