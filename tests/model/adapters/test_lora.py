"""LoRA and DoRA inside the model: values and gradients against dense weights, and what is in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import (
    adapter_initial_value,
    add_adapter,
    magnitude_of,
)
from olmoe_train.model.adapters.experts import LoraExperts
from olmoe_train.model.adapters.linear import row_norms
from olmoe_train.model.adapters.spec import (
    ATTENTION,
    EXPERTS,
    TARGETS,
    AdapterSpec,
    adapter_names,
    is_adapter_parameter,
)
from olmoe_train.model.moe.experts import sort_by_expert
from tests.support.sizes import SIZES


def adapted_model(spec: AdapterSpec, dtype: torch.dtype, **sizes: Any) -> OlmoeForCausalLM:
    """A model whose adapter is noise, so that no term of a gradient is 0 by itself."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    add_adapter(model, spec)
    model.to(dtype)
    weights = {adapter_names(name)[2]: p for name, p in model.named_parameters()}  # by magnitude
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("magnitude"):
                norms = magnitude_of(name, weights[name])
                parameter.copy_(norms * (0.5 + torch.rand_like(norms)))
            elif is_adapter_parameter(name):
                parameter.normal_(std=0.3)
    return model


def dense_weights(
    model: OlmoeForCausalLM, trained: dict[str, Tensor], spec: AdapterSpec
) -> dict[str, Tensor]:
    """Every weight as autograd sees it: W + s B A, times m / ||W + s B A|| with a constant norm."""
    weights = {}
    for name, parameter in model.named_parameters():
        if is_adapter_parameter(name):
            continue
        weight = trained.get(name, parameter.detach())
        name_a, name_b, name_m = adapter_names(name)
        if name_a in trained:
            transposed = "embed_tokens" in name
            base = weight.t() if transposed else weight
            weight = base + spec.scale * (trained[name_b] @ trained[name_a])
            if spec.dora:
                weight = weight * (trained[name_m] / weight.detach().norm(dim=-1)).unsqueeze(-1)
            weight = weight.t() if transposed else weight
        weights[name] = weight
    return weights


def loss_of(model: nn.Module, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross-entropy and a term of the routers, so that gradients reach everything."""
    output = model(ids_BS, targets=targets_BS)
    return output.ce_sum + 0.1 * output.router.squared_logsumexp_L.sum()


class Training(nn.Module):
    """`training_forward` as a module's forward, for functional_call."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: Tensor, targets: Tensor) -> Any:
        return self.model.training_forward(ids_BS, targets=targets)


@pytest.mark.parametrize("targets", [(ATTENTION,), (EXPERTS,), TARGETS])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("loop", torch.float64, 1e-9)])
def test_gradients_are_those_of_dense_weights(
    targets: tuple[str, ...], dora: bool, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    spec = AdapterSpec(rank=4, alpha=10.0, targets=targets, dora=dora, trains_router=True)
    model = adapted_model(spec, dtype, num_hidden_layers=2)
    model.set_experts_backend(backend)
    ids_BS = torch.randint(2, SIZES["vocab_size"], (2, 13))
    targets_BS = ids_BS.roll(-1, 1)
    loss = loss_of(Training(model), ids_BS, targets_BS)
    loss.backward()

    trained = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    plain = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"num_hidden_layers": 2})).to(dtype)
    weights = dense_weights(model, trained, spec)
    dense = {f"model.{name}": weight for name, weight in weights.items()}
    expected = functional_call(Training(plain), dense, (ids_BS,), {"targets": targets_BS})
    expected_loss = expected.ce_sum + 0.1 * expected.router.squared_logsumexp_L.sum()
    expected_loss.backward()

    assert abs(loss - expected_loss).item() < tolerance * abs(loss.item())
    assert len(trained) > 2 * len(targets)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        reference = trained[name].grad
        assert reference is not None, name
        assert reference.norm() > 0, name
        assert (parameter.grad - reference).norm() < tolerance * reference.norm(), name


def experts_and_rows(spec: AdapterSpec, dtype: torch.dtype, **sizes: Any) -> tuple[LoraExperts, Any]:
    """The experts of one layer, and (inputs, weights, routing) for them."""
    model = adapted_model(spec, dtype, num_hidden_layers=1, **sizes)
    experts = model.decoder_layers[0].mlp.experts
    assert isinstance(experts, LoraExperts)
    config = model.config
    x_ND = torch.randn(24, config.hidden_size, dtype=dtype, requires_grad=True)
    probs_TE = torch.rand(24, config.num_experts)
    probs_TE[:, 3] = 0  # an expert without rows
    values, indices = probs_TE.topk(config.num_experts_per_tok)
    weights = values.to(dtype).requires_grad_()
    return experts, (x_ND, weights, sort_by_expert(indices, config.num_experts))


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_of_experts_has_the_gradient_of_what_was_dropped(dora: bool) -> None:
    spec = AdapterSpec(rank=2, alpha=3.0, targets=(EXPERTS,), dropout=0.4, dora=dora)
    experts, (x_ND, weights, routing) = experts_and_rows(spec, torch.float64)
    tensors = [x_ND, weights, *(p for p in experts.parameters() if p.requires_grad)]
    directions = [torch.randn_like(tensor) for tensor in tensors]
    direction_out = torch.randn(24, 32, dtype=torch.float64)

    def value(step: float) -> Tensor:
        torch.manual_seed(7)
        moved = [t + step * d for t, d in zip(tensors, directions, strict=True)]
        names = [name for name, p in experts.named_parameters() if p.requires_grad]
        parameters = dict(zip(names, moved[2:], strict=True))
        out = functional_call(experts, parameters, (moved[0], moved[1], routing))
        return (out * direction_out).sum()

    torch.manual_seed(7)
    out = experts(x_ND, weights, routing)
    torch.manual_seed(8)
    assert not torch.allclose(out, experts(x_ND, weights, routing))  # something is dropped
    gradients = torch.autograd.grad((out * direction_out).sum(), tensors)
    if dora:  # only inputs, weights and magnitudes: A and B also move the norm, a constant in backward
        names = ["x", "w", *(name for name, p in experts.named_parameters() if p.requires_grad)]
        for index, name in enumerate(names):
            if "lora" in name:
                directions[index].zero_()
    slope = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()
    step = 1e-6
    measured = (value(step) - value(-step)) / (2 * step)
    assert abs(measured - slope) < 1e-6 * abs(slope)


def test_a_row_is_the_formula_of_its_expert() -> None:
    """DoRA by its definition, one token and one expert at a time."""
    spec = AdapterSpec(rank=4, alpha=10.0, targets=(EXPERTS,), rslora=True, dora=True)
    experts, (x_ND, weights, routing) = experts_and_rows(spec, torch.float64)
    out_ND = experts(x_ND, weights, routing)
    assert spec.scale == 10.0 / 2
    adapter = {name: parameter.detach() for name, parameter in experts.named_parameters()}

    def weight_of(kind: str, expert: int) -> Tensor:
        update = adapter[f"{kind}_lora_B"][expert] @ adapter[f"{kind}_lora_A"][expert]
        whole = adapter[f"{kind}_proj"][expert] + 5.0 * update
        return whole * (adapter[f"{kind}_magnitude"][expert] / whole.norm(dim=1))[:, None]

    experts_NJ = torch.searchsorted(routing.counts_E.cumsum(0), routing.row_NJ, right=True)
    for token in range(24):
        expected = torch.zeros(32, dtype=torch.float64)
        for choice in range(2):
            expert = int(experts_NJ[token, choice])
            gate, up = (weight_of("gate_up", expert) @ x_ND[token].detach()).chunk(2)
            gated = torch.nn.functional.silu(gate) * up
            expected += weights[token, choice].detach() * (weight_of("down", expert) @ gated)
        assert torch.allclose(out_ND[token], expected, rtol=0, atol=1e-10)


def test_the_norm_of_a_row_by_hand() -> None:
    # W + s B A = [[3, 0], [0, 1]] + 2 [[1], [0]] [[0, 2]] = [[3, 4], [0, 1]]
    weight, a, b = torch.tensor([[3.0, 0], [0, 1]]), torch.tensor([[0.0, 2]]), torch.tensor([[1.0], [0]])
    assert row_norms(weight, a, b, 2.0).tolist() == [5.0, 1.0]
    assert row_norms(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 1), 1.0).isfinite().all()


class LargestResult(TorchDispatchMode):
    """Elements of the largest floating-point tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point() and not is_view(func):
                self.elements = max(self.elements, value.numel())
        return result


def is_view(func: Any) -> bool:
    """Whether an operator's results alias its arguments."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_has_the_size_of_the_experts(backend: str, dora: bool, dtype: torch.dtype) -> None:
    spec = AdapterSpec(rank=8, alpha=10.0, targets=(EXPERTS,), dropout=0.1, dora=dora)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_experts": 16}
    experts, (x_ND, weights, routing) = experts_and_rows(spec, dtype, **sizes)
    experts.backend = backend
    with LargestResult() as largest:
        experts(x_ND, weights, routing).sum().backward()
    assert 0 < largest.elements < 16 * 64 * 64  # of down_proj, the smaller one
    with LargestResult() as largest:  # the check sees such a tensor
        _ = experts.down_lora_B @ experts.down_lora_A
    assert largest.elements == 16 * 64 * 64


@pytest.mark.parametrize("dora", [False, True])
def test_both_kernels_and_any_rank_agree(dora: bool) -> None:
    """A rank of 3 is padded to a multiple of 16 bytes for the grouped kernel."""
    spec = AdapterSpec(rank=3, alpha=10.0, targets=(EXPERTS,), dora=dora)
    experts, (x_ND, weights, routing) = experts_and_rows(spec, torch.float32)
    results = []
    for backend in ("loop", "grouped_mm"):
        experts.backend = backend
        out = experts(x_ND, weights, routing)
        trained = [p for p in experts.parameters() if p.requires_grad]
        results.append([out, *torch.autograd.grad(out.sum(), [x_ND, weights, *trained])])
    for loop, grouped in zip(*results, strict=True):
        assert (loop - grouped).norm() < 1e-5 * loop.norm()


def test_initial_values_depend_on_seed_name_and_expert_alone() -> None:
    name = "model.layers.1.mlp.experts.gate_up_lora_A"
    whole = adapter_initial_value(name, (8, 4, 32), 3)
    assert torch.equal(adapter_initial_value(name, (8, 4, 32), 3, range(2, 5)), whole[2:5])
    assert adapter_initial_value(name, (8, 4, 32), 3, range(0)).shape == (0, 4, 32)
    assert 0.9 * 32**-0.5 < whole.abs().max() <= 32**-0.5
    assert not adapter_initial_value(name.replace("_A", "_B"), (8, 32, 4), 3).any()
    assert not torch.equal(adapter_initial_value(name, (8, 4, 32), 4), whole)


def test_a_new_adapter_changes_nothing() -> None:
    """B is 0, and DoRA's magnitudes are the norms of the rows."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES)).eval()
    ids_BS = torch.randint(2, SIZES["vocab_size"], (2, 9))
    expected = model(ids_BS).logits
    add_adapter(model, AdapterSpec(rank=4, alpha=10.0, targets=TARGETS, dora=True))
    weights = {adapter_names(name)[2]: p for name, p in model.named_parameters()}  # by magnitude
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("magnitude"):
                parameter.copy_(magnitude_of(name, weights[name]))
            elif is_adapter_parameter(name):
                parameter.copy_(adapter_initial_value(name, parameter.shape, 0))
    assert torch.allclose(model(ids_BS).logits, expected, rtol=0, atol=1e-6)


def test_tied_weights_are_refused() -> None:
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="share one weight"):
        add_adapter(model, AdapterSpec(rank=4, alpha=10.0, targets=TARGETS))
