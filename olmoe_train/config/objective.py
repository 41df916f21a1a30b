"""The options of `objective`: one dataclass per training objective."""

from dataclasses import dataclass

from olmoe_train.config.variants import VariantConfig, register_variant


@dataclass(frozen=True)
class ObjectiveConfig(VariantConfig):
    """What every objective has."""


@dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy of the next token, for pretraining and supervised fine-tuning."""

    name: str = "next_token"


register_variant("objective", NextTokenConfig)
