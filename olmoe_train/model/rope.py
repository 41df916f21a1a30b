"""Rotary position embeddings (arXiv 2104.09864) and every scaled form that Transformers 5.23 gives OLMoE.

Shapes: B batch, S sequence, H head_dim, P = H/2 frequency pairs.

A frequency f_i (radians a token) turns the pair (i, i + P) of a head by position * f_i. The scaled forms
change the frequencies to reach beyond the pretraining length; two (yarn, longrope) also scale cos and sin.
"""

import math
from typing import Any

import torch
from torch import Tensor

from olmoe_train.model.configuration import OlmoeConfig

_TYPES_THAT_DEPEND_ON_LENGTH = ("dynamic", "longrope")


def rotary_cos_sin(config: OlmoeConfig, position_ids_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position and channel, each [B, S, H] of `dtype`; computed in fp32.

    For `dynamic` and `longrope` the frequencies follow the largest position of this call, read on the host.
    """
    length = None
    if config.rope_parameters["rope_type"] in _TYPES_THAT_DEPEND_ON_LENGTH:
        length = int(position_ids_BS.max()) + 1
    frequency_P, scale = rope_frequencies(config, length, position_ids_BS.device)
    angle_BSP = position_ids_BS[..., None].float() * frequency_P
    angle_BSH = torch.cat((angle_BSP, angle_BSP), dim=-1)
    return (angle_BSH.cos() * scale).to(dtype), (angle_BSH.sin() * scale).to(dtype)


def apply_rotary(q: Tensor, k: Tensor, cos_BSH: Tensor, sin_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, each [B, heads, S, H]; their numbers of heads may differ."""
    cos, sin = cos_BSH.unsqueeze(1), sin_BSH.unsqueeze(1)
    return q * cos + _quarter_turn(q) * sin, k * cos + _quarter_turn(k) * sin


def _quarter_turn(x: Tensor) -> Tensor:
    """Each pair (a, b), a from the first half of the channels and b from the second, becomes (-b, a)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope_frequencies(
    config: OlmoeConfig, sequence_length: int | None, device: torch.device | str | None
) -> tuple[Tensor, float]:
    """Frequencies in radians a token, fp32 [head_dim / 2], and the factor that multiplies cos and sin.

    `sequence_length` (largest position + 1) matters to `dynamic` and `longrope` only; None: a short one.
    Formulas as in Transformers 5.23 `modeling_rope_utils.py`; the default type agrees to the last bit.
    """
    rope = config.rope_parameters
    width, base = config.head_dim, rope["rope_theta"]
    match rope["rope_type"]:
        case "default":
            return _powers(base, width, device), 1.0
        case "linear":
            return _powers(base, width, device) / rope["factor"], 1.0
        case "dynamic":
            length = max(sequence_length or 0, config.max_position_embeddings)
            stretched = _dynamic_base(base, width, rope["factor"], length / config.max_position_embeddings)
            return _powers(stretched, width, device), 1.0
        case "yarn":
            return _yarn(config, device)
        case "longrope":
            return _longrope(config, sequence_length, device)
        case "llama3":
            return _llama3(_powers(base, width, device), rope), 1.0
        case "proportional":
            return _proportional(_powers(base, width, device), rope), 1.0
        case unknown:
            raise AssertionError(f"validate() lets no rope_type {unknown!r} pass")


def _powers(base: float, width: int, device: torch.device | str | None) -> Tensor:
    """base^(-2i/H) for i in 0..P-1, fp32 [P]."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / base**exponent


def _dynamic_base(base: float, width: int, factor: float, overlength: float) -> float:
    """NTK-aware base for a sequence `overlength` (at least 1) times as long as the pretraining length.

    The exponent H / (H - 2) keeps the fastest frequency and makes the slowest cover the longer range.
    """
    return base * (factor * overlength - (factor - 1)) ** (width / (width - 2))


def _yarn(config: OlmoeConfig, device: torch.device | str | None) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): slow frequencies are divided by the factor, fast ones kept."""
    rope, width = config.rope_parameters, config.head_dim
    original = rope["original_max_position_embeddings"]
    factor = _extension(config)
    keep_P = _yarn_kept_share(rope, width, original, device)
    frequency_P = _powers(rope["rope_theta"], width, device)
    frequency_P = frequency_P / factor * (1 - keep_P) + frequency_P * keep_P

    scale = rope.get("attention_factor")
    if scale is None:
        above, below = rope.get("mscale"), rope.get("mscale_all_dim")
        if above and below:
            scale = _yarn_scale(factor, above) / _yarn_scale(factor, below)
        else:
            scale = _yarn_scale(factor, 1.0)
    return frequency_P, scale


def _yarn_kept_share(
    rope: dict[str, Any], width: int, original: int, device: torch.device | str | None
) -> Tensor:
    """fp32 [P]: 1 for pairs of beta_fast turns or more in the pretraining length, 0 from beta_slow down."""

    def pair_that_turns(times: float) -> float:
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    # Transformers cuts at H - 1 although there are only P pairs: kept, because trained models rely on it.
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32, device=device) - low) / ((high - low) or 0.001)
    return 1 - ramp.clamp(0, 1)


def _yarn_scale(factor: float, weight: float) -> float:
    """The YaRN paper's 1/sqrt(t), against flatter attention over a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(
    config: OlmoeConfig, sequence_length: int | None, device: torch.device | str | None
) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): searched divisors of each pair, for short and for long inputs."""
    rope = config.rope_parameters
    original = rope["original_max_position_embeddings"]
    is_long = sequence_length is not None and sequence_length > original
    divisors = rope["long_factor"] if is_long else rope["short_factor"]
    divisor_P = torch.tensor(divisors, dtype=torch.float32, device=device)
    scale, factor = rope.get("attention_factor"), _extension(config)
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return _powers(rope["rope_theta"], config.head_dim, device) / divisor_P, scale


def _extension(config: OlmoeConfig) -> float:
    """How many times longer the context is than in pretraining: `factor`, or the ratio of the two lengths."""
    rope = config.rope_parameters
    if rope.get("factor") is not None:
        return float(rope["factor"])
    return config.max_position_embeddings / rope["original_max_position_embeddings"]


def _llama3(frequency_P: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1: slow frequencies are divided by the factor, fast ones kept, those between interpolated."""
    turns_P = rope["original_max_position_embeddings"] * frequency_P / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return (1 - keep_P) * frequency_P / rope["factor"] + keep_P * frequency_P


def _proportional(frequency_P: Tensor, rope: dict[str, Any]) -> Tensor:
    """Only the first share of the pairs turns; the others carry no position."""
    pairs = len(frequency_P)
    turning = int(rope.get("partial_rotary_factor", 1.0) * 2 * pairs // 2)
    turns_P = torch.arange(pairs, device=frequency_P.device) < turning
    return frequency_P * turns_P / rope.get("factor", 1.0)
