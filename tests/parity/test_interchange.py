"""Checkpoints travel both ways between Transformers and this package without a bit changing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from olmoe_train.model import OlmoeForCausalLM, OlmoeModel
from tests.support.pair import TINY, make_pair

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": TINY,
    "tied": {**TINY, "tie_word_embeddings": True},
    "biased_grouped": {**TINY, "attention_bias": True, "num_key_value_heads": 2, "clip_qkv": 3.0},
    "yarn": {**TINY, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "norm_topk_prob": True},
}
SIZES = {"single": "5GB", "sharded": "30KB"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bits(mine: nn.Module, other: nn.Module) -> None:
    expected = other.state_dict()
    assert mine.state_dict().keys() == expected.keys()
    for name, tensor in mine.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_to_ours_to_theirs(tmp_path: Path, name: str, size: str, dtype: torch.dtype) -> None:
    _, theirs = make_pair(CONFIGS[name])
    theirs.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size=SIZES[size])
    ours = OlmoeForCausalLM.from_pretrained(tmp_path / "theirs")
    assert_same_bits(ours, theirs)
    ours.save_pretrained(tmp_path / "ours", max_shard_size=SIZES[size])
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert (len(shards) == 1) == (size == "single")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(again, transformers.OlmoeForCausalLM)
    assert_same_bits(again, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_tensors_in_the_files(tmp_path: Path, name: str) -> None:
    ours, theirs = make_pair(CONFIGS[name])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_file(tmp_path / "ours" / "model.safetensors")
    other = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: t.shape for key, t in other.items()}
    assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_transformers_fused_names_on_disk(tmp_path: Path) -> None:
    """A directory with the in-memory names, as `safetensors.save_file(model.state_dict())` makes."""
    _, theirs = make_pair(TINY)
    theirs.config.save_pretrained(tmp_path)
    save_file(
        {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    assert_same_bits(OlmoeForCausalLM.from_pretrained(tmp_path), theirs)


def test_base_model_both_ways(tmp_path: Path) -> None:
    ours, theirs = make_pair(TINY)
    theirs.model.save_pretrained(tmp_path / "theirs")
    assert_same_bits(OlmoeModel.from_pretrained(tmp_path / "theirs"), theirs.model)
    ours.model.save_pretrained(tmp_path / "ours")
    assert_same_bits(transformers.OlmoeModel.from_pretrained(tmp_path / "ours"), theirs.model)


def test_generation_config_is_read_back(tmp_path: Path) -> None:
    ours, _ = make_pair({**TINY, "eos_token_id": [2, 5], "bos_token_id": 3})
    ours.save_pretrained(tmp_path)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == ([2, 5], 3, 1)


def test_exported_weights_compute_the_same(tmp_path: Path) -> None:
    ours, _ = make_pair(CONFIGS["yarn"])
    ours.save_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_type"] == "yarn"
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits, rtol=0, atol=2e-4)
