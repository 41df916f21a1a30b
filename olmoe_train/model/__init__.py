"""The OLMoE model, with the arguments, defaults and outputs that Transformers documents for it."""

from typing import TYPE_CHECKING, Any

from olmoe_train.model.configuration import OlmoeConfig

if TYPE_CHECKING:
    from olmoe_train.model.transformer import OlmoeForCausalLM, OlmoeModel

__all__ = ["OlmoeConfig", "OlmoeForCausalLM", "OlmoeModel"]


def __getattr__(name: str) -> Any:
    """Import the models when they are asked for: the configuration is read without torch (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from olmoe_train.model import transformer

    return getattr(transformer, name)
