"""Rotary position embeddings (RoPE, arXiv 2104.09864), with the scaled forms that Transformers gives OLMoE.

RoPE turns the pair of channels (i, i + P) of every query and key head by the angle position * f_i. The
frequency f_i, in radians per token, is base^(-2i/H); base is `rope_theta`, 10,000 in OLMoE-1B-7B. A token's
query and key are turned alike, so their product depends only on the distance between two tokens.

To follow the default form, read `rotary_cos_sin`, `apply_rotary` and `_default_frequencies`. The second half
of this file holds the six scaled forms. They change the frequencies so that a model reaches beyond the length
that it was pretrained with; two of them (yarn, longrope) also scale cos and sin. No released OLMoE uses them.
Formulas are those of Transformers 5.23 (`modeling_rope_utils.py`). The default form agrees with it bitwise.

Shapes: B batch, S sequence, N query heads, M key/value heads, H head width, P = H/2 frequencies.
"""

import math
from typing import Any

import torch
from torch import Tensor

from olmoe_train.model.configuration import OlmoeConfig

TYPES_THAT_DEPEND_ON_LENGTH = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on the largest position of the batch."""


def rotary_cos_sin(config: OlmoeConfig, position_ids_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of all positions and channels, computed in fp32.

    Args:
        config: Architecture of the model.
        position_ids_BS: Position of each token, an integer tensor [B, S]. For the RoPE types `dynamic` and
            `longrope` the frequencies depend on the largest position, for which the host waits.
        dtype: Data type of the results.

    Returns:
        cos and sin, each [B, S, H] of `dtype`. Channels i and i + P have the same value.
    """
    length = None
    if config.rope_parameters["rope_type"] in TYPES_THAT_DEPEND_ON_LENGTH:
        length = int(position_ids_BS.max()) + 1
    frequency_P, scale = rope_frequencies(config, length, position_ids_BS.device)
    angle_BSP = position_ids_BS[..., None].float() * frequency_P
    angle_BSH = torch.cat((angle_BSP, angle_BSP), dim=-1)
    return (angle_BSH.cos() * scale).to(dtype), (angle_BSH.sin() * scale).to(dtype)


def apply_rotary(q: Tensor, k: Tensor, cos_BSH: Tensor, sin_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys.

    Args:
        q: Queries, [B, N, S, H].
        k: Keys, [B, M, S, H].
        cos_BSH: Cosines from `rotary_cos_sin`.
        sin_BSH: Sines from `rotary_cos_sin`.

    Returns:
        The rotated queries and keys, of the same shapes.
    """
    cos, sin = cos_BSH.unsqueeze(1), sin_BSH.unsqueeze(1)
    return q * cos + _quarter_turn(q) * sin, k * cos + _quarter_turn(k) * sin


def _quarter_turn(x: Tensor) -> Tensor:
    """Turn each pair (a, b) into (-b, a); a is in the first half of the channels, b in the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope_frequencies(
    config: OlmoeConfig, sequence_length: int | None, device: torch.device | str | None
) -> tuple[Tensor, float]:
    """Frequencies of a RoPE type.

    Args:
        config: Architecture of the model.
        sequence_length: Largest position + 1, which matters to the types `dynamic` and `longrope` only.
            None: at most the pretraining length.
        device: Device of the frequencies.

    Returns:
        Frequencies in radians per token, fp32 [P]; and the factor by which cos and sin are multiplied.
    """
    rope = config.rope_parameters
    frequency_P = _default_frequencies(rope["rope_theta"], config.head_dim, device)
    match rope["rope_type"]:
        case "default":
            return frequency_P, 1.0
        case "linear":
            return frequency_P / rope["factor"], 1.0
        case "dynamic":
            return _dynamic(config, sequence_length, device), 1.0
        case "yarn":
            return _yarn(config, frequency_P)
        case "longrope":
            return _longrope(config, frequency_P, sequence_length)
        case "llama3":
            return _llama3(frequency_P, rope), 1.0
        case "proportional":
            return _proportional(frequency_P, rope), 1.0
        case unknown:
            raise AssertionError(f"OlmoeConfig.validate should have refused rope_type {unknown!r}")


def _default_frequencies(base: float, width: int, device: torch.device | str | None) -> Tensor:
    """base^(-2i/H) for i in 0..P-1, fp32 [P]; width is H."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / base**exponent


# --- scaled forms -----------------------------------------------------------------------------------------


def _dynamic(config: OlmoeConfig, sequence_length: int | None, device: torch.device | str | None) -> Tensor:
    """Dynamic NTK scaling: the base grows with the sequence once it is longer than the pretraining length.

    The exponent H / (H - 2) keeps the fastest frequency, and makes the slowest one cover the longer range.
    """
    rope, width, original = config.rope_parameters, config.head_dim, config.max_position_embeddings
    factor, overlength = rope["factor"], max(sequence_length or 0, original) / original
    base = rope["rope_theta"] * (factor * overlength - (factor - 1)) ** (width / (width - 2))
    return _default_frequencies(base, width, device)


def _yarn(config: OlmoeConfig, frequency_P: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): slow frequencies are divided by the factor, fast ones are kept."""
    rope, factor = config.rope_parameters, _extension(config)
    keep_P = _yarn_kept_share(rope, config.head_dim, frequency_P.device)
    frequency_P = frequency_P / factor * (1 - keep_P) + frequency_P * keep_P

    scale = rope.get("attention_factor")
    if scale is None:
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        if above and below:
            scale = _yarn_scale(factor, above) / _yarn_scale(factor, below)
        else:
            scale = _yarn_scale(factor, 1.0)
    return frequency_P, scale


def _yarn_kept_share(rope: dict[str, Any], width: int, device: torch.device) -> Tensor:
    """Share of each frequency that is kept, fp32 [P]: 1 for pairs that make at least beta_fast turns within
    the pretraining length, 0 for those that make at most beta_slow, and linear between; width is H."""
    original = rope["original_max_position_embeddings"]

    def pair_with_turns(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair_with_turns(rope.get("beta_fast") or 32), pair_with_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # Transformers clips at H - 1 although there are only P pairs. Kept, because models were trained with it.
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32, device=device) - low) / ((high - low) or 0.001)
    return 1 - ramp.clamp(0, 1)


def _yarn_scale(factor: float, weight: float) -> float:
    """1/sqrt(t) of the YaRN paper, which makes up for attention that is flatter over a context `factor` times
    as long."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(config: OlmoeConfig, frequency_P: Tensor, sequence_length: int | None) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): each frequency has a divisor, found by search, for short inputs and
    another one for inputs beyond the pretraining length."""
    rope = config.rope_parameters
    original = rope["original_max_position_embeddings"]
    is_long = sequence_length is not None and sequence_length > original
    divisors = rope["long_factor"] if is_long else rope["short_factor"]
    divisor_P = torch.tensor(divisors, dtype=torch.float32, device=frequency_P.device)
    scale, factor = rope.get("attention_factor"), _extension(config)
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequency_P / divisor_P, scale


def _extension(config: OlmoeConfig) -> float:
    """Context length divided by pretraining length: `factor`, or the quotient of the two lengths."""
    rope = config.rope_parameters
    if rope.get("factor") is not None:
        return float(rope["factor"])
    return config.max_position_embeddings / rope["original_max_position_embeddings"]


def _llama3(frequency_P: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1: slow frequencies are divided by the factor, fast ones are kept, those between are
    interpolated."""
    turns_P = rope["original_max_position_embeddings"] * frequency_P / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return (1 - keep_P) * frequency_P / rope["factor"] + keep_P * frequency_P


def _proportional(frequency_P: Tensor, rope: dict[str, Any]) -> Tensor:
    """Only the first share of the pairs is rotated. The other pairs carry no position."""
    pairs = len(frequency_P)
    rotated = int(rope.get("partial_rotary_factor", 1.0) * 2 * pairs // 2)
    is_rotated_P = torch.arange(pairs, device=frequency_P.device) < rotated
    return frequency_P * is_rotated_P / rope.get("factor", 1.0)
