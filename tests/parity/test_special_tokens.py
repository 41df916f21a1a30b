"""End-of-text and padding tokens: configuration against tokenizer files, and what generation takes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from olmoe_train.checkpoint.convert.stored_model import open_stored_model
from olmoe_train.cli.export import main as export
from olmoe_train.config.choices import ExportFormat
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils.errors import UserError
from tests.support.faults import config as train_config
from tests.support.faults import write_data
from tests.support.pair import TINY, make_pair

NEW = 30


def write_tokenizer(directory: Path, eos: int, pad: int | None = None, as_objects: bool = False) -> None:
    """As `tokenizers` and Transformers lay it out: one id from the vocabulary, one from the added tokens."""
    names = {eos: "<end>"} | ({} if pad is None else {pad: "<pad>"})
    words = {names.get(number, f"w{number}"): number for number in range(TINY["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": eos, "content": "<end>", "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w3"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    named: dict[str, Any] = {"eos_token": {"content": "<end>"} if as_objects else "<end>"}
    named |= {} if pad is None else {"pad_token": "<pad>"}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | named)
    )


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """eos 2, pad 1."""
    ours, _ = make_pair(TINY, seed=1)
    ours.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("as_objects", [False, True], ids=["text", "objects"])
def test_export_refuses_another_tokenizer_and_says_which(hf: Path, tmp_path: Path, as_objects: bool) -> None:
    cfg = ExportConfig(str(hf), out=str(tmp_path / "out"))
    write_tokenizer(hf, eos=7, pad=4, as_objects=as_objects)
    with pytest.raises(UserError) as caught:
        export(cfg)
    assert "eos_token_id=2, but the eos_token of the tokenizer in" in str(caught.value)
    assert "is '<end>', which is token 7" in str(caught.value)
    assert "pad_token_id=1, but the pad_token of the tokenizer in" in str(caught.value)
    assert not (tmp_path / "out").exists()

    for kind in (ExportFormat.hf, ExportFormat.olmo):
        out = tmp_path / f"as_{kind.value}"
        export(replace(cfg, out=str(out), format=kind, eos_token_id=7, pad_token_id=4))
        assert (open_stored_model(out).config.eos_token_id, open_stored_model(out).config.pad_token_id) == (
            7,
            4,
        )


def test_what_is_not_stated_is_no_contradiction(hf: Path, tmp_path: Path) -> None:
    write_tokenizer(hf, eos=2)
    export(ExportConfig(str(hf), out=str(tmp_path / "out")))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_right_tokenizer_can_be_given(hf: Path, tmp_path: Path) -> None:
    write_tokenizer(hf, eos=7)
    (tmp_path / "right").mkdir()
    write_tokenizer(tmp_path / "right", eos=2, pad=1)
    export(ExportConfig(str(hf), out=str(tmp_path / "out"), tokenizer=str(tmp_path / "right")))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 1)
    with pytest.raises(UserError, match="tokenizer=nowhere: does not exist"):
        export(ExportConfig(str(hf), out=str(tmp_path / "other"), tokenizer="nowhere"))


def test_training_refuses_another_tokenizer(hf: Path, tmp_path: Path) -> None:
    cfg = train_config(write_data(tmp_path / "data"), tmp_path / "run", parallel={"expert_parallel_size": 1})
    validate(cfg, 1)
    write_tokenizer(hf, eos=7)
    with pytest.raises(
        UserError, match=r"model\.eos_token_id=0, but the eos_token of the tokenizer in .*hf is .* token 7"
    ):
        validate(replace(cfg, model=replace(cfg.model, init_from=str(hf))), 1)
    # The data's own, which the run's exports carry.
    write_tokenizer(tmp_path / "data" / "tokenizer", eos=0, pad=5)
    manifest = tmp_path / "data" / "manifest.json"
    tokenizer = (tmp_path / "data" / "tokenizer" / "tokenizer.json").read_bytes()
    values = json.loads(manifest.read_text()) | {"tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest()}
    manifest.write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"model\.pad_token_id=1, but the pad_token of the tokenizer in .* is '<pad>'"
    ):
        validate(cfg, 1)
    validate(replace(cfg, model=replace(cfg.model, pad_token_id=5)), 1)
    assert ModelConfig().pad_token_id == 1


@pytest.mark.parametrize(
    "stated",
    [{"eos_token_id": [70, 62]}, {"eos_token_id": 5, "pad_token_id": 9}, {"pad_token_id": 9}],
    ids=str,
)
def test_generation_config_decides_as_in_transformers(hf: Path, stated: dict[str, Any]) -> None:
    (hf / "generation_config.json").write_text(json.dumps(stated))
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"eos_token_id": 74}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hf)
    ours = OlmoeForCausalLM.from_pretrained(hf)
    ids = torch.randint(10, 80, (6, 4), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert ours.generate(ids, attention_mask=mask, max_new_tokens=NEW).tolist() == expected.tolist()
    del ours.generation_config
    assert ours.generate(ids, attention_mask=mask, max_new_tokens=NEW).tolist() != expected.tolist()


def test_generation_config_travels(hf: Path, tmp_path: Path) -> None:
    (hf / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.7}')
    export(ExportConfig(str(hf), out=str(tmp_path / "out")))
    OlmoeForCausalLM.from_pretrained(hf).save_pretrained(tmp_path / "saved")
    for name in ("out", "saved"):
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert written == {"eos_token_id": [2, 7], "temperature": 0.7}
