"""The experts' own forward and backward: padded rows, half precision, what is kept from one to the other."""

import pytest
import torch
from torch import Tensor

from olmoe_train.model import OlmoeConfig
from olmoe_train.model.moe.experts import CPU_ROW_MULTIPLE, OlmoeExperts, pad_rows, sort_by_expert

TOKENS, HIDDEN = 96, 32


def test_sorting_and_padding_by_hand() -> None:
    """Experts 0, 1, 2 get tokens (1), none and (0, 1, 2); filled up to multiples of two."""
    routing = sort_by_expert(torch.tensor([[2], [2], [2], [0]]), 3)
    assert routing.token_R.tolist() == [3, 0, 1, 2]
    assert routing.counts_E.tolist() == [1, 0, 3]
    padded = pad_rows(routing, 2)
    assert padded.counts_E.tolist() == [2, 0, 4]
    assert padded.token_R.tolist() == [3, 0, 0, 1, 2, 0]
    assert padded.row_NJ.tolist() == [[2], [3], [4], [0]]
    assert padded.padding is not None
    assert padded.padding.tolist() == [1, 5]


def build(num_experts: int, width: int, dtype: torch.dtype, activation: str = "silu") -> OlmoeExperts:
    config = OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=width,
        num_experts=num_experts,
        num_experts_per_tok=1,
        hidden_act=activation,
    )
    module = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.to(dtype)


def inputs(num_experts: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD, weights_TK and indices_TK; expert 1 gets nothing."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    router_ED = torch.randn(num_experts, HIDDEN, generator=generator) * 0.2
    scores_TE = x_TD.float() @ router_ED.t()
    scores_TE[:, 1] = -100.0
    weights_TK, indices_TK = scores_TE.softmax(-1).topk(top_k)
    return x_TD.requires_grad_(), weights_TK.requires_grad_(), indices_TK


def gradients(
    module: OlmoeExperts, top_k: int, dtype: torch.dtype, row_multiple: int | None = None
) -> list[Tensor]:
    """Output, and gradients of x, the weights of the choices, gate_up and down.

    row_multiple: pad the rows of each expert to a multiple of it. None leaves that to the module.
    """
    num_experts = len(module.gate_up_proj)
    x_TD, weights_TK, indices_TK = inputs(num_experts, top_k, dtype)
    routing = sort_by_expert(indices_TK, num_experts)
    if row_multiple is not None:
        routing = pad_rows(routing, row_multiple)
    out_TD = module(x_TD, weights_TK, routing)
    into_TD = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out_TD.backward(into_TD)
    return [out_TD.detach(), *gradients_of(x_TD, weights_TK, *module.parameters())]


def gradients_of(*tensors: Tensor) -> list[Tensor]:
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert len(gradients) == len(tensors)
    return gradients


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
def test_padding_changes_nothing(activation: str) -> None:
    plain, padded = (
        gradients(build(4, 16, torch.float32, activation), 2, torch.float32, row_multiple=multiple)
        for multiple in (None, CPU_ROW_MULTIPLE)
    )
    for found, expected in zip(padded, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_bfloat16_is_as_near_as_it_can_be(backend: str) -> None:
    """Against the slow reference in float64, on the same rounded inputs: 96 x 2 rows of 4 experts are padded
    in the loop."""
    module = build(4, 16, torch.bfloat16)
    module.backend = backend
    found = gradients(module, 2, torch.bfloat16)
    exact = build(4, 16, torch.bfloat16).double()
    x_TD, weights_TK, indices_TK = inputs(4, 2, torch.bfloat16)
    x_TD, weights_TK = (t.detach().double().requires_grad_() for t in (x_TD, weights_TK))
    out_TD = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for choice in range(2):
        gate_up = exact.gate_up_proj[indices_TK[:, choice]]
        gate, up = torch.einsum("thd,td->th", gate_up, x_TD).chunk(2, dim=-1)
        product = torch.nn.functional.silu(gate) * up
        expert_out = torch.einsum("tdf,tf->td", exact.down_proj[indices_TK[:, choice]], product)
        out_TD = out_TD + weights_TK[:, choice, None] * expert_out
    into_TD = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    out_TD.backward(into_TD.double())
    expected = [out_TD.detach(), *gradients_of(x_TD, weights_TK, *exact.parameters())]
    for value, reference in zip(found, expected, strict=True):
        error = (value.double() - reference).norm() / reference.norm()
        assert error < 0.01, error.item()  # bf16 rounds by up to 0.4%


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_what_is_kept_does_not_depend_on_granularity(backend: str) -> None:
    """Twice as many experts of half the width, twice as many a token: the same bytes, but for the weights of
    the choices."""

    def kept(num_experts: int, width: int, top_k: int) -> int:
        module = build(num_experts, width, torch.float32)
        module.backend = backend
        x_TD, weights_TK, indices_TK = inputs(num_experts, top_k, torch.float32)
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if not any(tensor is own for own in (weights_TK, *module.parameters())):
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            module(x_TD, weights_TK, sort_by_expert(indices_TK, num_experts))
        return sum(saved.values())

    # x: 96 x 32 floats; gate and up: 96 x 2 x 2 x 32 (and 96 x 4 x 2 x 16).
    assert kept(4, 32, 2) == kept(8, 16, 4) == 4 * TOKENS * (HIDDEN + 2 * 2 * 32)
