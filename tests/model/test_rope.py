"""RoPE against numbers worked by hand; parity with Transformers is in tests/parity/test_rope_parity.py."""

import math
from typing import Any

import pytest
import torch

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.rope import apply_rotary, rope_frequencies, rotary_cos_sin


def config(head_dim: int = 4, **rope: Any) -> OlmoeConfig:
    """Two heads of `head_dim`, pretrained on 64 positions."""
    rope = {"rope_theta": 100.0, **rope}
    return OlmoeConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope
    )


def frequencies(length: int | None = None, **kwargs: Any) -> tuple[list[float], float]:
    frequency_P, scale = rope_frequencies(config(**kwargs), length, "cpu")
    assert frequency_P.dtype == torch.float32
    return frequency_P.tolist(), scale


def assert_frequencies(expected: list[float], expected_scale: float, **kwargs: Any) -> None:
    got, scale = frequencies(**kwargs)
    assert got == pytest.approx(expected)
    assert scale == pytest.approx(expected_scale)


def test_default_frequencies_are_powers_of_theta() -> None:
    # 100^(-0/4) and 100^(-2/4)
    assert_frequencies([1.0, 0.1], 1.0)


def test_linear_divides_every_frequency() -> None:
    assert_frequencies([0.25, 0.025], 1.0, rope_type="linear", factor=4.0)


def test_dynamic_raises_theta_only_beyond_the_pretraining_length() -> None:
    assert frequencies(64, rope_type="dynamic", factor=2.0)[0] == pytest.approx([1.0, 0.1])
    assert frequencies(None, rope_type="dynamic", factor=2.0)[0] == pytest.approx([1.0, 0.1])
    # length 128 = twice 64: base 100 * (2 * 2 - 1)^(4 / 2) = 900, so 900^(-1/2)
    assert frequencies(128, rope_type="dynamic", factor=2.0)[0] == pytest.approx([1.0, 1 / 30])


def test_longrope_has_a_list_for_short_and_one_for_long_inputs() -> None:
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": [1.0, 2.0],
        "long_factor": [4.0, 5.0],
        "original_max_position_embeddings": 16,
    }
    # factor 64 / 16 = 4; sqrt(1 + ln 4 / ln 16) = sqrt(1.5)
    scale = math.sqrt(1.5)
    assert_frequencies([1.0, 0.05], scale, length=16, **rope)
    assert_frequencies([0.25, 0.02], scale, length=17, **rope)


def test_llama3_keeps_fast_divides_slow_and_blends_between() -> None:
    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 20 * math.pi,  # so that frequency f turns 10 f times
    }
    # f = 1 turns 10 times, kept; f = 0.1 turns once, so it sits on the low edge, divided by 8
    assert frequencies(**rope)[0] == pytest.approx([1.0, 0.1 / 8])
    # theta 25: f = 0.2 turns twice, half way from 1 to 3: 0.5 * 0.2 / 8 + 0.5 * 0.2
    assert frequencies(**rope, rope_theta=25.0)[0] == pytest.approx([1.0, 0.1125])


def test_yarn_keeps_fast_divides_slow_and_scales_cos_and_sin() -> None:
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": 10.0,
        "original_max_position_embeddings": 200 * math.pi,  # so that frequency f turns 100 f times
        "beta_fast": 100.0,  # pair 0, f = 1
        "beta_slow": 1.0,  # pair 4 of 8: f = 10^-2 with theta 10^4 and head_dim 16
        "rope_theta": 10000.0,
    }
    got, scale = frequencies(head_dim=16, **rope)
    keep = [1, 0.75, 0.5, 0.25, 0, 0, 0, 0]
    plain = [10 ** (-i / 2) for i in range(8)]
    assert got == pytest.approx(
        [f * k + f / 10 * (1 - k) for f, k in zip(plain, keep, strict=True)], rel=1e-4
    )
    assert scale == pytest.approx(0.1 * math.log(10) + 1)


def test_proportional_turns_the_first_pairs_only() -> None:
    assert frequencies(rope_type="proportional", partial_rotary_factor=0.5)[0] == pytest.approx([1.0, 0.0])


def test_apply_rotary_turns_a_pair_of_halves_by_the_angle() -> None:
    quarter = config(head_dim=2, rope_theta=1.0)
    cos, sin = rotary_cos_sin(quarter, torch.tensor([[0, 1]]), torch.float32)
    assert cos.shape == (1, 2, 2)
    q = torch.tensor([[[[3.0, 4.0], [3.0, 4.0]]]])
    turned, also = apply_rotary(q, q[:, :, :], cos, sin)
    c, s = math.cos(1), math.sin(1)
    expected = torch.tensor([[[[3.0, 4.0], [3 * c - 4 * s, 4 * c + 3 * s]]]])
    torch.testing.assert_close(turned, expected)
    torch.testing.assert_close(also, expected)


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()
    far = config(head_dim=8)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        cos, sin = rotary_cos_sin(far, torch.tensor([[query_at]]), torch.float32)
        turned_q, _ = apply_rotary(q, k, cos, sin)
        cos, sin = rotary_cos_sin(far, torch.tensor([[key_at]]), torch.float32)
        _, turned_k = apply_rotary(q, k, cos, sin)
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(5, 2), score(35, 32), rtol=1e-4, atol=1e-5)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_cos_and_sin_are_computed_in_fp32_and_then_rounded() -> None:
    positions = torch.tensor([[4095]])  # not a bfloat16 number
    cos32, sin32 = rotary_cos_sin(config(), positions, torch.float32)
    cos16, sin16 = rotary_cos_sin(config(), positions, torch.bfloat16)
    assert torch.equal(cos16, cos32.bfloat16())
    assert torch.equal(sin16, sin32.bfloat16())
