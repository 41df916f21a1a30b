"""Counts of a model with an adapter: what is trained, and what is held in 4 bits."""

from dataclasses import dataclass

import torch

from olmoe_train.config.adapter import AdapterConfig, adapter_spec, quantizes_base
from olmoe_train.config.choices import Precision
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter, freeze_base, quantizable
from olmoe_train.model.adapters.nf4 import BLOCK
from olmoe_train.model.adapters.spec import AdapterSpec


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter, and how its base is held."""

    spec: AdapterSpec
    quantized: bool
    """Whether the adapted weights are held in NF4."""


def adapter_plan(cfg: AdapterConfig) -> AdapterPlan | None:
    """The adapter that `adapter=...` names; None without one."""
    spec = adapter_spec(cfg)
    return None if spec is None else AdapterPlan(spec, quantizes_base(cfg))


def compute_dtype(precision: Precision) -> torch.dtype:
    """Data type of the computation."""
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def meta_model(config: OlmoeConfig, adapter: AdapterPlan | None, precision: Precision) -> OlmoeForCausalLM:
    """A model whose tensors have the shapes, dtypes and `requires_grad` of training, with no memory."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    if adapter is not None:
        add_adapter(model, adapter.spec)
        freeze_base(model, compute_dtype(precision), adapter.quantized)
    return model


@dataclass(frozen=True)
class AdapterCounts:
    """Numbers of parameters."""

    base: int
    """Of the model without the adapter."""
    trained: int
    """Of the adapter, and of the routers if they are trained."""
    quantized: int
    """Of the base, in 4 bits."""

    def __str__(self) -> str:
        text = (
            f"{self.trained:,} parameters are trained, {self.trained / self.base:.2%} of the "
            f"{self.base:,} of the model"
        )
        if self.quantized:
            text += (
                f"; {self.quantized / self.base:.1%} of the model is held in 4 bits, "
                f"{self.quantized * (0.5 + 4 / BLOCK) / 10**6:,.1f} MB with its scales"
            )
        return text


def adapter_counts(config: OlmoeConfig, spec: AdapterSpec, quantize_base: bool) -> AdapterCounts:
    """Count on a meta model; nothing is allocated.

    Args:
        config: Architecture of the model.
        spec: The adapter.
        quantize_base: Whether the adapted weights are held in NF4.
    """
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    base = sum(parameter.numel() for parameter in model.parameters())
    add_adapter(model, spec)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    quantized = 0
    if quantize_base:
        weights = [getattr(module, parameter) for _, module, parameter, _ in quantizable(model)]
        quantized = sum(weight.numel() for weight in weights)
    return AdapterCounts(base, trained, quantized)
