"""Every rope type against Transformers: frequencies from ROPE_INIT_FUNCTIONS, cos and sin from its module."""

from typing import Any

import pytest
import torch
from transformers import OlmoeConfig as TransformersConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeRotaryEmbedding

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.rope import rope_frequencies, rotary_cos_sin
from olmoe_train.model.rope_parameters import ROPE_TYPES

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256, "vocab_size": 128}
PAIRS = 8
LONG = {"short_factor": [1.0 + i / 7 for i in range(PAIRS)], "long_factor": [2.0 + i for i in range(PAIRS)]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    # Every pair turns more than once in so long a context, so the ramp ends beyond the last pair.
    "yarn_long": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100_000},
    "yarn_ratio": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    "yarn_no_original": {"rope_type": "yarn", "factor": 2.0},
    "yarn_betas": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 8.0,
        "beta_slow": 0.25,
        "truncate": False,
    },
    "yarn_mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn_scale": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    "longrope": {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 64},
    "longrope_factor": {
        "rope_type": "longrope",
        **LONG,
        "factor": 7.0,
        "original_max_position_embeddings": 64,
    },
    "longrope_scale": {"rope_type": "longrope", **LONG, "attention_factor": 1.1},
    "llama3": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 64},
    "llama3_no_original": {"rope_type": "llama3", **LLAMA3},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.4, "rope_theta": 100.0},
}


def both(rope: dict[str, Any]) -> tuple[OlmoeConfig, TransformersConfig]:
    return OlmoeConfig(**SIZES, rope_parameters=dict(rope)), TransformersConfig(
        **SIZES, rope_parameters=dict(rope)
    )


def test_every_rope_type_is_here() -> None:
    assert {rope["rope_type"] for rope in ROPES.values()} == set(ROPE_TYPES)
    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS}, (
        "Transformers has other types than this package"
    )


@pytest.mark.parametrize("length", [None, 1, 64, 65, 256, 257, 700])
@pytest.mark.parametrize("name", [name for name, rope in ROPES.items() if rope["rope_type"] != "default"])
def test_frequencies_and_scale(name: str, length: int | None) -> None:
    ours, theirs = both(ROPES[name])
    expected, expected_scale = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](theirs, "cpu", seq_len=length)
    got, scale = rope_frequencies(ours, length, "cpu")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    assert scale == pytest.approx(expected_scale, rel=1e-12)


@pytest.mark.parametrize("name", ROPES)
def test_cos_and_sin(name: str) -> None:
    ours, theirs = both(ROPES[name])
    for first, last in [(0, 40), (0, 64), (0, 65), (0, 300), (290, 301), (0, 50)]:
        positions = torch.arange(first, last)[None] + torch.tensor([[0], [2]])
        # A fresh module each time: Transformers' `dynamic` remembers the longest sequence of its life.
        expected = OlmoeRotaryEmbedding(theirs)(torch.empty(0), positions)
        got = rotary_cos_sin(ours, positions, torch.float32)
        # Angles reach 300 radians, where one fp32 ulp of a frequency (6e-8) is 2e-5 radians.
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-5)


def test_default_type_is_bit_equal() -> None:
    ours, theirs = both({"rope_type": "default", "rope_theta": 10000.0})
    positions = torch.arange(4096)[None]
    expected = OlmoeRotaryEmbedding(theirs)(torch.empty(0), positions)
    got = rotary_cos_sin(ours, positions, torch.float32)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
