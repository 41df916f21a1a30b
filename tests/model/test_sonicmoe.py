"""model.experts_backend=sonicmoe: what is handed to the package, and where it is refused.

Its kernels run where CUDA, a Hopper or Blackwell GPU and the package are: parity there is the last test's.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.model import OlmoeConfig
from olmoe_train.model.moe.experts import OlmoeExperts, expert_indices, sort_by_expert
from olmoe_train.model.moe.sonicmoe import why_not_here

EXPERTS, TOP_K, HIDDEN, WIDTH, TOKENS = 6, 2, 16, 24, 40
MISSING = why_not_here(torch.cuda.is_available())


def as_documented(
    x: Tensor, scores: Tensor, tokens: Tensor, experts: Tensor, w1: Tensor, b1: None, w2: Tensor, b2: None,
    count: int, stream: int, activation: str, *, concat_layout: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sonicmoe.moe_general_routing_inputs, in plain torch, with what its comments ask of the arguments."""
    assert (activation, concat_layout, b1, b2) == ("swiglu", True, None, None)
    assert scores.dtype == torch.float32
    assert tokens.dtype == experts.dtype == torch.int32
    assert scores.shape == tokens.shape == experts.shape
    assert tokens.equal(tokens.sort().values)
    width, hidden = w1.shape[0] // 2, x.shape[1]
    assert (w1.shape, w2.shape) == ((2 * width, hidden, count), (hidden, width, count))
    for matrix in (w1, w2):
        assert matrix.permute(2, 0, 1).is_contiguous()  # "stride order (2, 0, 1)"
    out = torch.zeros_like(x)
    for score, token, expert in zip(scores, tokens.long(), experts.long(), strict=True):
        gate, up = (w1[:, :, expert] @ x[token]).chunk(2)
        out = out.index_add(0, token[None], (score * (w2[:, :, expert] @ (F.silu(gate) * up)))[None])
    return out, experts.bincount(minlength=count)


def results(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output, and gradients of inputs, weights and both matrices."""
    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )
    experts = OlmoeExperts(config)
    experts.backend = backend
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    experts.to(device, dtype)
    x_ND, d_out_ND = (torch.randn(TOKENS, HIDDEN, generator=generator).to(device, dtype) for _ in range(2))
    scores_NE = torch.rand(TOKENS, EXPERTS, generator=generator)
    weights_NJ, indices_NJ = (each.to(device) for each in scores_NE.topk(TOP_K))
    inputs = [x_ND.requires_grad_(), weights_NJ.requires_grad_(), *experts.parameters()]
    out_ND = experts(x_ND, weights_NJ, sort_by_expert(indices_NJ, EXPERTS))
    return [out_ND, *torch.autograd.grad(out_ND, inputs, d_out_ND)]


def test_the_experts_of_a_routing_are_those_it_was_made_of() -> None:
    indices_NJ = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    indices_NJ[indices_NJ == 3] = 0  # and an expert without any
    assert expert_indices(sort_by_expert(indices_NJ, EXPERTS)).equal(indices_NJ)


def test_what_the_package_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    package, enums = ModuleType("sonicmoe"), ModuleType("sonicmoe.enums")
    package.moe_general_routing_inputs = as_documented
    enums.ActivationType = SimpleNamespace(SWIGLU="swiglu")
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    for found, expected in zip(results("sonicmoe"), results("loop"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(version: tuple[int, ...], cuda: bool, package: Any, capability: int) -> str | None:
        monkeypatch.setattr(sys, "version_info", version)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: package)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        return why_not_here(cuda)

    assert lacking((3, 11, 7), True, "there", 9) == "sonic-moe needs Python >= 3.12, this is 3.11"
    assert "NVIDIA GPUs alone" in str(lacking((3, 12, 1), False, "there", 9))
    assert "pip install --no-deps sonic-moe" in str(lacking((3, 12, 1), True, None, 9))
    assert "Hopper and Blackwell; this GPU's capability is 8" in str(lacking((3, 12, 1), True, "there", 8))
    assert lacking((3, 12, 1), True, "there", 9) is None


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_its_kernels_compute_what_the_loop_computes() -> None:
    for found, expected in zip(
        results("sonicmoe", "cuda", torch.bfloat16), results("loop", "cuda", torch.bfloat16), strict=True
    ):
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < 2e-2
