"""Puts an adapter into a model, freezes the rest, and knows which parameters are the adapter's.

Shapes: E experts, R rank of the adapter, I input width of a weight, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.experts import LoraExperts
from olmoe_train.model.adapters.linear import LoraEmbedding, LoraHead, LoraLinear
from olmoe_train.model.adapters.nf4 import Nf4Weight
from olmoe_train.model.adapters.spec import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    LM_HEAD,
    AdapterSpec,
    is_adapter_parameter,
)
from olmoe_train.model.initialization import generator_of
from olmoe_train.model.moe.block import OlmoeTopKRouter

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def add_adapter(model: OlmoeForCausalLM, spec: AdapterSpec) -> None:
    """Put an adapter into a model, in place, and freeze every other parameter but the router's if it trains.

    The adapter's parameters are allocated on the device of the weights, and not filled: see
    `adapter_initial_value`.

    Args:
        model: A model whose weights are whole, or on the meta device.
        spec: The adapter.

    Raises:
        ValueError: The head and the embedding are one tied weight, and one of them is a target.
    """
    if model.config.tie_word_embeddings and {LM_HEAD, EMBEDDINGS} & set(spec.targets):
        raise ValueError("lm_head and embeddings share one weight in this model and cannot have an adapter")
    for layer in model.decoder_layers:
        if ATTENTION in spec.targets:
            for name in PROJECTIONS:
                setattr(layer.self_attn, name, LoraLinear(getattr(layer.self_attn, name), spec))
        if EXPERTS in spec.targets:
            layer.mlp.experts = LoraExperts(model.config, layer.mlp.experts, spec)
    if LM_HEAD in spec.targets:
        model.lm_head = LoraHead(model.config, model.lm_head, spec)
    if EMBEDDINGS in spec.targets:
        model.model.embed_tokens = LoraEmbedding(model.model.embed_tokens, spec)
    for name, parameter in model.named_parameters():
        of_router = spec.trains_router and name.endswith("mlp.gate.weight")
        parameter.requires_grad_(of_router or is_adapter_parameter(name))
    model.adapter = spec


@contextmanager
def adapter_off(model: OlmoeForCausalLM) -> Iterator[None]:
    """Let the model compute what its frozen base computes, in forward passes within the block.

    A router that trains next to the adapter stays as it is.
    """
    modules = [
        m for m in model.modules() if isinstance(m, LoraLinear | LoraHead | LoraEmbedding | LoraExperts)
    ]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True


def adapter_initial_value(
    name: str, shape: Sequence[int], seed: int, experts: Sequence[int] | None = None
) -> Tensor:
    """Initial value of an adapter's parameter, as in PEFT; a function of (seed, name, expert) alone.

    lora_A is uniform in +-1/sqrt(I) and lora_B is 0; of an embedding, lora_A is 0 and lora_B is normal with
    standard deviation 1. A magnitude is 0 here; `magnitude_of` gives its value.

    Args:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        seed: Seed of the run.
        experts: For stacked parameters [E, ...], the experts to generate (default: all).

    Returns:
        fp32 on the CPU, as `initialization.initial_value`.
    """
    embedding = "embed_tokens" in name
    if name.endswith(("magnitude", "lora_A" if embedding else "lora_B")):
        first = shape[:1] if experts is None else (len(experts),)
        return torch.zeros(*first, *shape[1:])
    if embedding:
        return torch.empty(*shape).normal_(generator=generator_of(f"{seed}/{name}"))

    def uniform(key: str, of_shape: Sequence[int]) -> Tensor:
        bound = 1 / math.sqrt(of_shape[-1])
        return torch.empty(*of_shape).uniform_(-bound, bound, generator=generator_of(key))

    if len(shape) == 2:
        return uniform(f"{seed}/{name}", shape)
    indices = range(shape[0]) if experts is None else experts
    values = [uniform(f"{seed}/{name}/{expert}", shape[1:]) for expert in indices]
    return torch.stack(values) if values else torch.empty(0, *shape[1:])


def magnitude_of(name: str, weight: Tensor) -> Tensor:
    """Initial magnitude of DoRA, the norm of each row of the frozen weight, in fp32 (fp64 for fp64).

    Args:
        name: Name of the magnitude.
        weight: The weight that the magnitude is for, as the model computes with it.
    """
    if "embed_tokens" in name:
        weight = weight.t()
    return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.promote_types(weight.dtype, torch.float32))


def is_quantizable(name: str) -> bool:
    """Whether NF4 quantizes a weight of this name that has an adapter: attention projections and experts."""
    return ".self_attn." in name or ".mlp.experts." in name


def quantizable(model: OlmoeForCausalLM) -> Iterator[tuple[str, nn.Module, str, str]]:
    """The adapted weights that `is_quantizable` names.

    Yields:
        (name of the weight in the model, its module, name of the parameter there, name of the attribute that
        holds its Nf4Weight).
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraExperts):
            yield f"{name}.gate_up_proj", module, "gate_up_proj", "gate_up_nf4"
            yield f"{name}.down_proj", module, "down_proj", "down_nf4"
        elif isinstance(module, LoraLinear):
            yield f"{name}.weight", module, "weight", "nf4"


def freeze_base(model: OlmoeForCausalLM, dtype: torch.dtype, quantized: bool) -> None:
    """Give the frozen weights of a meta model the dtype that they are held in, in place.

    No update needs the fp32 values of a frozen weight. The router computes in fp32 and stays fp32.

    Args:
        model: A model with an adapter, on the meta device.
        dtype: Data type of the computation.
        quantized: Whether the adapted weights are held in NF4.
    """
    if dtype is not torch.float32:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad and not isinstance(module, OlmoeTopKRouter):
                    frozen = nn.Parameter(parameter.to(dtype), requires_grad=False)
                    module.register_parameter(name, frozen)
        model.tie_weights()
    if quantized:
        quantize_base(model)


def quantize_base(model: OlmoeForCausalLM) -> None:
    """Replace the adapted weights by unset Nf4Weights, in place.

    Args:
        model: A model with an adapter, on the meta device.
    """
    for _, module, parameter, attribute in list(quantizable(model)):
        weight = getattr(module, parameter)
        setattr(module, attribute, Nf4Weight(weight.shape, weight.device))
        setattr(module, parameter, None)


def quantized_weights(model: OlmoeForCausalLM) -> dict[str, Nf4Weight]:
    """The quantized weights of a model, by the name of the weight that each replaces."""
    found = {name: getattr(module, attribute) for name, module, _, attribute in quantizable(model)}
    return {name: weight for name, weight in found.items() if weight is not None}
