"""Checks of `OlmoeConfig.rope_parameters`: which keys each RoPE type needs, and which values are valid."""

from typing import Any

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
ROPE_TYPES_WITH_ORIGINAL_LENGTH = ("yarn", "longrope", "llama3")
"""Types that need original_max_position_embeddings, the length that the model was pretrained with."""
_REQUIRED_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "proportional": (),
}


def rope_problems(rope: dict[str, Any], head_dim: int) -> list[str]:
    """Check the parameters of a RoPE type.

    Args:
        rope: `rope_parameters`; its rope_type is one of ROPE_TYPES, and rope_theta is set.
        head_dim: Width of an attention head.

    Returns:
        One message for each key that is missing or invalid, with the fix.
    """
    pairs = head_dim // 2
    kind = rope["rope_type"]
    numbers = {"rope_theta": rope["rope_theta"]}
    for name in _REQUIRED_NUMBERS[kind]:
        numbers[name] = rope.get(name)
    for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
        if rope.get(name) is not None:
            numbers[name] = rope[name]
    problems = [
        f"rope_parameters.{name}={value!r} must be a number above 0 for rope_type {kind}"
        for name, value in numbers.items()
        if type(value) not in (int, float) or not value > 0
    ]
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if not _is_list_of_positive(rope.get(name), pairs):
                problems.append(
                    f"rope_parameters.{name}={rope.get(name)!r} must list {pairs} numbers above 0"
                )
    if kind == "llama3" and not problems and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        problems.append("rope_parameters.high_freq_factor must be above low_freq_factor")
    if kind == "dynamic" and pairs == 1:
        problems.append("rope_type dynamic needs attention heads wider than 2: lower num_attention_heads")
    share = rope.get("partial_rotary_factor", 1.0)
    if kind == "proportional" and (type(share) not in (int, float) or not 0 < share <= 1):
        problems.append(f"rope_parameters.partial_rotary_factor={share!r} must be above 0 and at most 1")
    if kind != "proportional" and share != 1.0:
        problems.append(
            f"rope_parameters.partial_rotary_factor={share!r}: with rope_type {kind}, OLMoE rotates whole "
            "heads; remove the key, or use rope_type proportional"
        )
    return problems


def _is_list_of_positive(value: Any, length: int) -> bool:
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(type(each) in (int, float) and each > 0 for each in value)
