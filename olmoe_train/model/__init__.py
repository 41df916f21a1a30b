"""The OLMoE model, with the arguments, defaults and outputs that Transformers documents for it."""

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.transformer import OlmoeForCausalLM, OlmoeModel

__all__ = ["OlmoeConfig", "OlmoeForCausalLM", "OlmoeModel"]
