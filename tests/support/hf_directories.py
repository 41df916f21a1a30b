"""A tiny model, and functions with which tests of Hugging Face directories read and edit its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support.sizes import SIZES

# Tests list the tensors and bytes of the files by hand, and split the files into shards of 700 bytes.
TINY: dict[str, Any] = SIZES | {
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 3,
    "eos_token_id": 2,
}


def make(**changes: Any) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**TINY | changes))


def assert_same(mine: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = dict(other.named_parameters())
    assert expected.keys() == {name for name, _ in mine.named_parameters()}
    for name, parameter in mine.named_parameters():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name]), name


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = tensors_of(directory)
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")
