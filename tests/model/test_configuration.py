"""OlmoeConfig: defaults, spellings, what is kept, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.utils.errors import UserError

# config.json of the OLMoE-1B-7B-0924 release, written by Transformers 4: spellings that must stay readable.
RELEASED = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}


def test_released_file_reads_as_the_released_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    config = OlmoeConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.dtype is torch.bfloat16
    assert config.head_dim == 128
    for name, value in RELEASED.items():
        if name not in ("torch_dtype", "rope_scaling", "rope_theta"):
            assert getattr(config, name) == value, name


def test_old_rope_scaling_with_type() -> None:
    config = OlmoeConfig(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}


def test_rope_theta_inside_rope_parameters_wins_over_one_beside() -> None:
    config = OlmoeConfig(rope_theta=5.0, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert config.rope_parameters["rope_theta"] == 7.0


def test_pretraining_length_of_scaled_rope_defaults_to_max_position_embeddings() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0}
    assert OlmoeConfig(rope_parameters=rope, max_position_embeddings=512).rope_parameters == {
        **rope,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 512,
    }
    beside = OlmoeConfig(rope_parameters=rope, original_max_position_embeddings=128)
    assert beside.rope_parameters["original_max_position_embeddings"] == 128
    assert rope == {"rope_type": "yarn", "factor": 4.0}, "the caller's dictionary was changed"


def test_key_value_heads_default_to_the_query_heads() -> None:
    assert OlmoeConfig(num_attention_heads=8).num_key_value_heads == 8
    assert OlmoeConfig().num_key_value_heads == 16
    assert OlmoeConfig(num_key_value_heads=4).num_key_value_heads == 4


def test_num_local_experts_is_num_experts() -> None:
    config = OlmoeConfig(num_local_experts=16)
    assert config.num_experts == config.num_local_experts == 16
    assert "num_local_experts" not in config.to_dict()
    with pytest.raises(UserError, match="num_local_experts=16 contradicts num_experts=8"):
        OlmoeConfig(num_local_experts=16, num_experts=8)


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtype_spellings(spelling: Any) -> None:
    assert OlmoeConfig(dtype=spelling).dtype is torch.bfloat16
    assert OlmoeConfig(torch_dtype=spelling).dtype is torch.bfloat16
    assert OlmoeConfig(dtype=spelling).to_dict()["dtype"] == "bfloat16"


def test_unknown_fields_are_attributes_and_written_back(tmp_path: Path) -> None:
    note = {"made_by": [1, 2]}
    OlmoeConfig(transformers_version="4.45.0", lab_note=note, head_dim=128).save_pretrained(tmp_path)
    again = OlmoeConfig.from_pretrained(tmp_path)
    assert again.lab_note == note
    assert again.to_dict()["lab_note"] == note
    assert again.transformers_version == "4.45.0"
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        again.nothing_of_the_kind  # noqa: B018


def test_save_and_read_back_is_the_same_configuration(tmp_path: Path) -> None:
    config = OlmoeConfig(
        vocab_size=300,
        num_key_value_heads=4,
        clip_qkv=3.5,
        eos_token_id=[2, 3],
        dtype="float16",
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 123.0},
    )
    config.save_pretrained(tmp_path)
    assert OlmoeConfig.from_pretrained(tmp_path) == config
    assert OlmoeConfig.from_dict(config.to_dict()) == config
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 123.0, "older readers look for rope_theta at the top"
    assert written["torch_dtype"] == written["dtype"] == "float16"


def test_to_dict_shares_nothing_with_the_configuration() -> None:
    config = OlmoeConfig()
    config.to_dict()["rope_parameters"]["rope_theta"] = 1.0
    assert config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": "50304"}, "vocab_size='50304' must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be an integer of at least 1"),
        ({"num_experts": True}, "num_experts=True must be an integer"),
        ({"hidden_size": 2050}, "hidden_size=2050 is not divisible by num_attention_heads=16"),
        ({"hidden_size": 48}, "heads of width 3, and RoPE rotates pairs"),
        ({"num_key_value_heads": 3}, "num_attention_heads=16 is not divisible by num_key_value_heads=3"),
        ({"head_dim": 64}, "head_dim=64 must be hidden_size=2048 / num_attention_heads=16"),
        ({"num_experts": 4}, "num_experts_per_tok=8 is more than num_experts=4"),
        ({"hidden_act": "sliu"}, r"hidden_act='sliu' is unknown; choose from .*silu"),
        ({"hidden_act": "prelu"}, "hidden_act='prelu' is unknown"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0 must be below 1"),
        ({"clip_qkv": 0.0}, "clip_qkv=0.0 must be a number above 0, or null"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ({"pad_token_id": 50304}, "pad_token_id=50304 must be null or a token below vocab_size=50304"),
        ({"dtype": "float33"}, "dtype='float33' is not a torch dtype"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral', but only 'olmoe'"),
        ({"rope_parameters": "yarn"}, "rope_parameters='yarn' must be an object"),
        ({"rope_parameters": {"rope_type": "yarm"}}, "rope_type='yarm' is unknown; choose from default"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "rope_parameters.factor=None must be a number above 0",
        ),
        (
            {"rope_parameters": {"rope_theta": -1.0}},
            "rope_parameters.rope_theta=-1.0 must be a number above 0",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor=None must be a number",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [1.0]}},
            r"long_factor=\[1.0\] must list 64 numbers",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5: with rope_type default, OLMoE rotates",
        ),
    ],
)
def test_bad_values_name_the_field_and_the_fix(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OlmoeConfig(**values)


def test_all_bad_fields_are_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"hidden_size=30 is not divisible.*num_experts_per_tok=9 is more"):
        OlmoeConfig(hidden_size=30, num_experts=8, num_experts_per_tok=9)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such_dir"):
        OlmoeConfig.from_pretrained(tmp_path / "no_such_dir")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        OlmoeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="found a JSON list"):
        OlmoeConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"num_experts": 0}')
    with pytest.raises(UserError, match=r"config\.json: invalid OlmoeConfig: num_experts=0"):
        OlmoeConfig.from_pretrained(tmp_path)
