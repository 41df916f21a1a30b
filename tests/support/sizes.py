"""The tiny model of the tests. A test that needs other sizes derives them from SIZES and says why."""

from collections.abc import Mapping
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 1,
    "eos_token_id": 0,
}
"""Fields of OlmoeConfig and ModelConfig."""


def section(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a section of the configuration by key, for example model.hidden_size."""
    return {f"{name}.{field}": value for field, value in values.items()}


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Return values by key as overrides of a command line or of `compose`; None is written as null."""
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]
