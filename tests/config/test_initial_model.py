"""model.init_from decides the architecture: keys that are not given take its values, others must agree."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from olmoe_train.cli.app import run_verb
from olmoe_train.config import compose
from olmoe_train.config.compose import plain_values
from olmoe_train.config.data import DataConfig
from olmoe_train.config.initial_model import ARCHITECTURE
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import TrainConfig, TrainerConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared

# No value is that of the schema or of a preset.
STORED: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "num_experts": 10, "num_experts_per_tok": 3,
    "norm_topk_prob": True, "hidden_act": "gelu", "max_position_embeddings": 300, "initializer_range": 0.03,
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "attention_bias": True, "attention_dropout": 0.25, "clip_qkv": 8.0, "tie_word_embeddings": True,
    "pad_token_id": 2, "bos_token_id": 3, "eos_token_id": 4,
}  # fmt: skip
# What no HF directory has, as released; and with no value of that.
RELEASED: dict[str, Any] = {
    "num_shared_experts": 0, "routing": "token_choice", "expert_capacity": None, "qk_norm": True,
    "norm": "rms", "initialization": "truncated_normal",
}  # fmt: skip
OTHERS: dict[str, Any] = {
    "num_shared_experts": 2, "routing": "expert_choice", "expert_capacity": 1.5, "qk_norm": False,
    "norm": "nonparametric", "initialization": "normal",
}  # fmt: skip


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    OlmoeConfig(**STORED).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def model_of(directory: Path, *overrides: str) -> ModelConfig:
    return compose(f"model.init_from={directory}", "data.dir=x", *overrides).model


def architecture(model: ModelConfig) -> dict[str, Any]:
    return {name: plain_values(model)[name] for name in ARCHITECTURE}


def test_the_directory_alone_is_enough(stored: Path) -> None:
    assert STORED.keys() | RELEASED.keys() == set(ARCHITECTURE)
    for more in ([], ["experiment=olmoe_sft"], ["experiment=quickstart"], ["model.experts_backend=loop"]):
        assert architecture(model_of(stored, *more)) == STORED | RELEASED


def test_a_run_and_an_olmo_checkpoint_are_enough(stored: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    OmegaConf.save(plain_values(compose(f"model.init_from={stored}", "data.dir=x")), run / "config.yaml")
    assert architecture(model_of(run)) == STORED | RELEASED
    choices = STORED | {"norm_topk_prob": False} | OTHERS
    model = replace(compose("data.dir=x").model, **choices)
    OmegaConf.save(plain_values(compose("data.dir=x")) | {"model": plain_values(model)}, run / "config.yaml")
    assert architecture(model_of(run, "model.norm=nonparametric")) == choices
    with pytest.raises(UserError, match=r"model\.norm=rms, and nonparametric there"):
        model_of(run, "model.norm=rms")

    theirs = {
        "block_type": "moe", "layer_norm_type": "rms", "attention_layer_norm": True, "rope": True,
        "include_bias": False, "d_model": 48, "n_heads": 6, "n_layers": 3, "mlp_hidden_size": 40,
        "max_sequence_length": 300, "vocab_size": 95, "embedding_size": 96, "pad_token_id": 2,
        "eos_token_id": 4, "weight_tying": True, "moe_num_experts": 10, "moe_top_k": 3,
    }  # fmt: skip
    olmo = tmp_path / "olmo"
    olmo.mkdir()
    OmegaConf.save({"model": theirs}, olmo / "config.yaml")
    model = model_of(olmo)
    assert (model.vocab_size, model.hidden_size, model.intermediate_size) == (96, 48, 20)
    assert (model.num_experts, model.num_key_value_heads, model.eos_token_id) == (10, 6, 4)


def test_without_init_from_presets_and_defaults_are_those_of_before() -> None:
    assert compose("data.dir=x").model == compose("data.dir=x", "model=olmoe_quickstart").model
    assert compose("data.dir=x").model.num_experts == 16
    assert compose("data.dir=x", "model.num_experts=8").model.num_experts == 8
    model = compose("data.dir=x", "model.rope_parameters.rope_theta=5", "model=olmoe_1b_7b").model
    assert model.rope_parameters == {"rope_type": "default", "rope_theta": 5}
    assert model.num_experts == 64


def test_a_type_of_rope_may_have_parameters_that_the_default_has_not() -> None:
    model = compose("data.dir=x", "model.rope_parameters={rope_type: linear, factor: 2}").model
    assert model.rope_parameters == {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}


def test_what_agrees_is_silent(stored: Path) -> None:
    given = ["model.hidden_size=48", "model.clip_qkv=8", "model.rope_parameters.rope_theta=500"]
    given += ["model.norm_topk_prob=true", "model.rope_parameters={rope_type: linear, factor: 2}"]
    assert architecture(model_of(stored, *given)) == STORED | RELEASED


@pytest.mark.parametrize("name", [name for name in STORED if name != "attention_dropout"])
def test_each_key_that_contradicts_is_named_with_both_values(stored: Path, name: str) -> None:
    other = {"rope_parameters": "{rope_theta: 7}", "hidden_act": "silu", "num_key_value_heads": "null"}
    value = other.get(name, "false" if isinstance(STORED[name], bool) else "1")
    key, theirs = name, STORED[name]
    if name == "rope_parameters":
        key, value, theirs = "rope_parameters.rope_theta", "7", 500.0
    theirs = "true" if theirs is True else theirs
    with pytest.raises(UserError) as caught:
        model_of(stored, f"model.{key}={value}")
    shown = "1.0" if isinstance(theirs, float) and value == "1" else value
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"model.init_from={stored}: its configuration decides the architecture; these keys differ:"
    )
    assert lines[1:-1] == [f"  model.{key}={shown}, and {theirs} there"]


def test_presets_count_as_given(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    for choice in ("model=olmoe_1b_7b", "experiment=olmoe_1b_7b_0924"):
        with pytest.raises(UserError, match=r"model\.hidden_size=2048, and 48 there"):
            model_of(stored, choice)
    (tmp_path / "mine/experiment").mkdir(parents=True)
    own = "# @package _global_\nmodel: {num_experts: 12, num_experts_per_tok: 3}\n"
    (tmp_path / "mine/experiment/own.yaml").write_text(own)
    arguments = ["--config-dir", str(tmp_path / "mine"), "experiment=own", f"model.init_from={stored}"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "data.dir=x"])
    assert run_verb("train", TrainConfig, lambda cfg: None) == 2
    told = capsys.readouterr().err
    assert "model.num_experts=12, and 10 there" in told
    assert "num_experts_per_tok" not in told


def test_dropout_is_an_option_of_training(stored: Path) -> None:
    assert model_of(stored, "model.attention_dropout=0").attention_dropout == 0


def test_one_of_several_end_of_text_tokens(stored: Path) -> None:
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"eos_token_id": [4, 9]}))
    assert model_of(stored).eos_token_id == 4
    assert model_of(stored, "model.eos_token_id=9").eos_token_id == 9
    with pytest.raises(UserError, match=r"model\.eos_token_id=8, and \[4, 9\] there"):
        model_of(stored, "model.eos_token_id=8")


def test_a_configuration_cannot_read_the_environment(stored: Path) -> None:
    config = json.loads((stored / "config.json").read_text())
    config["rope_parameters"]["note"] = "${oc.env:HOME}"
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="contain"):
        model_of(stored)


def test_cfg_job_prints_what_the_run_gets(
    stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in (["--cfg", "job"], ["--cfg=job"], ["-c", "job"]):
        monkeypatch.setattr(sys, "argv", ["train", *flag, f"model.init_from={stored}"])
        assert run_verb("train", TrainConfig, lambda cfg: pytest.fail("only printed")) == 0
        printed = OmegaConf.create(capsys.readouterr().out)
        assert {name: printed.model[name] for name in ARCHITECTURE} == STORED | RELEASED
        assert OmegaConf.is_missing(printed.data, "dir")


def test_data_of_another_tokenizer_names_the_directory(stored: Path, tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", [[5] * 100], [[6] * 100], vocab_size=200)
    cfg = TrainConfig(
        model=model_of(stored),
        data=DataConfig(dir=str(tmp_path / "data"), sequence_length=512),
        trainer=TrainerConfig(max_steps=1),
    )
    with pytest.raises(UserError) as caught:
        validate(cfg, world_size=1)
    origin = f" (from the configuration of model.init_from={stored})"
    fix = f"prepare the data with the model's own tokenizer: olmoe prepare tokenizer.path={stored}"
    told = str(caught.value)
    assert f"model.vocab_size=96{origin}: the data in" in told
    assert f"model.eos_token_id=4{origin}: documents in" in told
    assert told.count(fix) == 2
    assert f"model.max_position_embeddings=300{origin}; lower data.sequence_length or raise" in told


def test_a_revision_of_a_directory_has_no_effect(stored: Path, tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", [[5] * 100], [[6] * 100], vocab_size=90)
    manifest = tmp_path / "data/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"eos_token_id": 4}))
    overrides = [f"data.dir={tmp_path}/data", "data.sequence_length=32", "trainer.max_steps=1"]
    cfg = compose(f"model.init_from={stored}", "model.revision=v1", *overrides)
    warning = f"model.revision has no effect: model.init_from={stored} is no name on the hub"
    assert warning in validate(cfg, world_size=1)
