"""model.experts_backend=sonicmoe: the call of the package computes the experts, and the reasons for refusal.

The kernels need CUDA, a Hopper or Blackwell GPU and the package. Where these are, the last test runs them.
Elsewhere the package's function is computed by its definition.
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


def routing_by_definition(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int,
    activation_type: str,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute sonicmoe.moe_general_routing_inputs row by row, after checking what it asks of its arguments.

    The signature and the requirements are those of release 0.1.2.post1, sonicmoe/functional/__init__.py: "We
    assume token_indices is already SORTED ascendingly"; as many tokens, experts and scores; int32 indices;
    GLU activations alone; w1 of shape (2 F, D, E) and w2 of shape (D, F, E), with strides in the order (2, 0,
    1). With concat_layout the rows of w1 are all gates, then all ups; without it, gates and ups alternate.
    """
    assert activation_type == "swiglu"
    assert b1 is None
    assert b2 is None
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert router_scores.shape == token_indices.shape == expert_indices.shape
    assert token_indices.equal(token_indices.sort().values)
    width, hidden = w1.shape[0] // 2, x.shape[1]
    assert (w1.shape, w2.shape) == ((2 * width, hidden, E), (hidden, width, E))
    for matrix in (w1, w2):
        assert matrix.permute(2, 0, 1).is_contiguous()
    out = torch.zeros_like(x)
    for score, token, expert in zip(
        router_scores.float(), token_indices.long(), expert_indices.long(), strict=True
    ):
        inner = w1[:, :, expert] @ x[token]
        gate, up = inner.chunk(2) if concat_layout else (inner[::2], inner[1::2])
        out = out.index_add(0, token[None], (score * (w2[:, :, expert] @ (F.silu(gate) * up)))[None])
    return out, expert_indices.bincount(minlength=E)


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


def test_the_call_computes_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    package, enums = ModuleType("sonicmoe"), ModuleType("sonicmoe.enums")
    package.moe_general_routing_inputs = routing_by_definition
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
