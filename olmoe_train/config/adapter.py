"""The options of `adapter`, which decides what is trained: one dataclass per kind of adapter."""

from dataclasses import dataclass

from olmoe_train.config.variants import VariantConfig, register_variant


@dataclass(frozen=True)
class AdapterConfig(VariantConfig):
    """What every adapter has."""


@dataclass(frozen=True)
class NoAdapterConfig(AdapterConfig):
    """No adapter: every parameter of the model is trained."""

    name: str = "none"


register_variant("adapter", NoAdapterConfig)
