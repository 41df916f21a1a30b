"""The `hf` convention is Transformers' load_balancing_loss_func: value and gradient."""

import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from olmoe_train.model.losses import load_balancing_loss


@pytest.mark.parametrize("mask_kind", ["none", "random", "all"])
@pytest.mark.parametrize(("layers", "experts", "top_k"), [(1, 4, 1), (3, 7, 2), (2, 64, 8), (2, 5, 5)])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_hf_convention(layers: int, experts: int, top_k: int, scale: float, mask_kind: str) -> None:
    generator = torch.Generator().manual_seed(layers + experts)
    logits = [scale * torch.randn(4 * 6, experts, generator=generator) for _ in range(layers)]
    mask = {
        "none": None,
        "random": (torch.rand(4, 6, generator=generator) < 0.6).long(),
        "all": torch.ones(4, 6, dtype=torch.long),
    }[mask_kind]
    mine, other = ([x.clone().requires_grad_() for x in logits] for _ in range(2))
    got = load_balancing_loss(mine, experts, top_k, mask, convention="hf")
    expected = load_balancing_loss_func(tuple(other), experts, top_k, mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    got.backward()
    expected.backward()
    for x, y in zip(mine, other, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-8)
