"""OlmoeConfig against Transformers': the same fields, defaults and reading of files, both ways."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers import OlmoeConfig as TransformersConfig
from transformers.activations import ACT2FN

from olmoe_train.model.ablations import ABLATIONS
from olmoe_train.model.activations import ACTIVATIONS
from olmoe_train.model.configuration import OlmoeConfig

# Of Transformers' base class, and without a meaning for a decoder-only language model.
NOT_OURS = {"id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward"}
# Design choices that Transformers does not have; no exported file has them.
ONLY_OURS = {*ABLATIONS, "initialization"}

FILES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": None, "num_attention_heads": 8},
    {"rope_theta": 500000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}, "torch_dtype": "float16"},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 512},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 128},
    {"vocab_size": 99, "clip_qkv": 8.0, "eos_token_id": [3, 4], "dtype": "bfloat16", "lab_note": [1]},
    {"num_local_experts": 16, "tie_word_embeddings": True},
]


def test_documented_fields_and_defaults() -> None:
    theirs = TransformersConfig()
    documented = {item.name for item in fields(TransformersConfig)} - NOT_OURS - {"transformers_version"}
    ours = OlmoeConfig()
    for name in documented | {"output_attentions", "num_local_experts", "model_type"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    of_ours = {item.name for item in fields(OlmoeConfig)} - ONLY_OURS - {"extra", "output_attentions"}
    assert of_ours <= documented


@pytest.mark.parametrize("values", FILES, ids=lambda values: ",".join(values) or "defaults")
def test_both_read_the_same_from_the_same_values(values: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = OlmoeConfig(**values), TransformersConfig(**values)
    assert same_fields(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    assert same_fields(ours, AutoConfig.from_pretrained(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs")
    assert same_fields(OlmoeConfig.from_pretrained(tmp_path / "theirs"), theirs)


def same_fields(ours: OlmoeConfig, theirs: TransformersConfig) -> bool:
    theirs.standardize_rope_params()  # as its rotary module does before it reads them
    for name, value in vars(ours).items():
        if name in ONLY_OURS:
            assert value == getattr(OlmoeConfig(), name), name
        elif name == "extra":
            # Transformers states its version when it writes a file, not in the object it wrote it from.
            kept = {key: each for key, each in value.items() if key != "transformers_version"}
            assert all(getattr(theirs, key) == each for key, each in kept.items())
        elif name == "rope_parameters":
            assert value == {key: each for key, each in theirs.rope_parameters.items() if key != "type"}
        else:
            assert value == getattr(theirs, name), name
    return True


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients(name: str) -> None:
    x = torch.linspace(-12, 12, 401, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = ACTIVATIONS[name](x), ACT2FN[name](y)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-6, atol=2e-6)


def test_every_activation_without_weights_is_here() -> None:
    with_weights = {"prelu", "xielu"}
    assert set(ACTIVATIONS) == set(ACT2FN) - with_weights
