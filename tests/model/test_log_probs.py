"""Log-probabilities of targets by the chunked head, and the model with its adapter off.

Shapes: P positions with a target, D hidden, V vocabulary, R rank of an adapter, B batch, S sequence.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import (
    adapter_off,
    add_adapter,
    magnitude_of,
    quantize_base,
    quantized_weights,
)
from olmoe_train.model.adapters.nf4 import round_trip_nf4
from olmoe_train.model.adapters.spec import (
    ATTENTION,
    EXPERTS,
    TARGETS,
    AdapterSpec,
    adapter_names,
    is_adapter_parameter,
)
from olmoe_train.model.cross_entropy import HEAD_CHUNK_ROWS, HeadAdapter, target_log_probs_of
from tests.support.sizes import SIZES

P, D, V, R = 2 * HEAD_CHUNK_ROWS + 37, 16, 80, 4
# Shares of the norm of the values and of a gradient. bf16 rounds each logit and each gradient to 2^-9 of its
# value. The softmax of the backward pass is fp32 for fp64 inputs, too.
TOLERANCE = {torch.float64: (1e-12, 1e-6), torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 2e-2)}


def head_inputs(adapter: str, dtype: torch.dtype, frozen: bool) -> dict[str, Tensor]:
    """Inputs of the head that need a gradient, but for a frozen weight. adapter: none, lora or dora."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {"hidden_PD": noise(P, D), "weight_VD": noise(V, D) * 0.3}
    if adapter != "none":
        inputs |= {"low_PR": noise(P, R), "b_VR": noise(V, R) * 0.3}
    if adapter == "dora":
        inputs["gain_V"] = 1 + noise(V) * 0.2
    return {
        name: tensor.requires_grad_(not (frozen and name == "weight_VD")) for name, tensor in inputs.items()
    }


def chunked(inputs: dict[str, Tensor], targets_P: Tensor) -> Tensor:
    adapter = None
    if "low_PR" in inputs:
        adapter = HeadAdapter(inputs["low_PR"], inputs["b_VR"], inputs.get("gain_V"))
    return target_log_probs_of(inputs["hidden_PD"], inputs["weight_VD"], targets_P, adapter=adapter)


def dense(inputs: dict[str, Tensor], targets_P: Tensor) -> Tensor:
    """The same by log_softmax of all logits, in fp64."""
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    logits_PV = wide["hidden_PD"] @ wide["weight_VD"].t()
    if "low_PR" in wide:
        logits_PV = logits_PV + wide["low_PR"] @ wide["b_VR"].t()
    if "gain_V" in wide:
        logits_PV = logits_PV * wide["gain_V"]
    return logits_PV.log_softmax(-1).gather(1, targets_P[:, None]).squeeze(1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients_are_those_of_the_dense_head(
    adapter: str, dtype: torch.dtype, frozen: bool
) -> None:
    inputs = head_inputs(adapter, dtype, frozen)
    generator = torch.Generator().manual_seed(1)
    targets_P = torch.randint(V, (P,), generator=generator)
    # A weight per position, of both signs, as a preference loss has.
    d_out_P = torch.randn(P, generator=generator)
    trained = [tensor for tensor in inputs.values() if tensor.requires_grad]
    results = []
    for function in (chunked, dense):
        out_P = function(inputs, targets_P)
        gradients = torch.autograd.grad(out_P, trained, d_out_P.to(out_P.dtype))
        results.append([out_P, *gradients])
    assert results[0][0].dtype == torch.promote_types(dtype, torch.float32)
    assert all(gradient.dtype == dtype for gradient in results[0][1:])
    of_values, of_gradients = TOLERANCE[dtype]
    tolerances = [of_values] + [of_gradients] * len(trained)
    for ours, exact, tolerance in zip(*results, tolerances, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


class LargestResult(TorchDispatchMode):
    """Elements of the largest storage of a floating-point tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_floating_point():
                size = value.untyped_storage().nbytes() // value.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_positions_are_never_in_memory(dtype: torch.dtype) -> None:
    inputs = head_inputs("dora", dtype, frozen=False)
    targets_P = torch.zeros(P, dtype=torch.int64)
    with LargestResult() as largest:
        chunked(inputs, targets_P).sum().backward()
    assert largest.elements == HEAD_CHUNK_ROWS * V
    with LargestResult() as largest:  # the check sees such a tensor
        dense(inputs, targets_P)
    assert largest.elements == P * V


@pytest.mark.parametrize("kind", ["lora", "dora", "nf4"])
def test_adapter_off_is_the_base_bit_for_bit(kind: str) -> None:
    torch.manual_seed(0)
    base = OlmoeForCausalLM(OlmoeConfig(**SIZES))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.2)
    weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    targets = (ATTENTION, EXPERTS) if kind == "nf4" else TARGETS
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
    model.load_state_dict(weights)
    add_adapter(model, AdapterSpec(rank=4, alpha=8.0, targets=targets, dropout=0.5, dora=kind == "dora"))
    if kind == "nf4":
        quantize_base(model)
        for name, weight in quantized_weights(model).items():
            weight.set_weight(weights[name])
            with torch.no_grad():
                base.get_parameter(name).copy_(round_trip_nf4(weights[name]))
    base_of_magnitude = {adapter_names(name)[2]: name for name in weights}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("magnitude"):
                parameter.copy_(2 * magnitude_of(name, weights[base_of_magnitude[name]]))
            elif is_adapter_parameter(name):
                parameter.normal_(std=0.3)
    model.train()
    ids_BS = torch.randint(3, SIZES["vocab_size"], (2, 9))

    def logits(of: OlmoeForCausalLM) -> Tensor:
        torch.manual_seed(1)  # dropout draws the same elements
        with torch.no_grad():
            return of(ids_BS).logits

    adapted = logits(model)
    with adapter_off(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), adapted)
    with pytest.raises(RuntimeError, match="inside"), adapter_off(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), adapted)
    assert not torch.equal(adapted, logits(base))
