"""Counts of a model with an adapter: what is trained, and what is held in 4 bits."""

from dataclasses import dataclass

import torch

from olmoe_train.config.adapter import AdapterConfig, adapter_spec, quantizes_base
from olmoe_train.config.choices import Precision
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter, freeze_base, quantized_weights
from olmoe_train.model.adapters.nf4 import BLOCK
from olmoe_train.model.adapters.spec import AdapterSpec
from olmoe_train.planning.flops import parameter_counts


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


def meta_model(config: OlmoeConfig, adapter: AdapterPlan | None, precision: Precision) -> OlmoeForCausalLM:
    """A model whose tensors have the shapes, dtypes and `requires_grad` of training, with no memory."""
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    if adapter is not None:
        add_adapter(model, adapter.spec)
        freeze_base(model, precision.dtype, adapter.quantized)
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


def adapter_counts(config: OlmoeConfig, adapter: AdapterPlan) -> AdapterCounts:
    """Count on a meta model; nothing is allocated.

    Args:
        config: Architecture of the model.
        adapter: The adapter.
    """
    model = meta_model(config, adapter, Precision.fp32)
    return AdapterCounts(
        base=parameter_counts(config).total,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        quantized=sum(weight.shape.numel() for weight in quantized_weights(model).values()),
    )
