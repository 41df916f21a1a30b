"""Of a few documents one is held out and one is trained on, at least; a single one is trained on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.config.choices import SourceKind
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.manifest import read_manifest
from olmoe_train.data.prepare import pipeline
from olmoe_train.data.prepare.limits import Limits
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.utils.errors import UserError
from tests.support.data import contents, prepare_config, read_texts


def corpus(path: Path, documents: int, **fields: Any) -> Path:
    records = [
        {"id": f"talk-{number}", "text": f"document {number}.", **fields} for number in range(documents)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(directory: Path, path: Path, fraction: float, **source: Any) -> PrepareConfig:
    paths = [str(path)]
    return prepare_config(
        directory, kind=SourceKind.files, paths=paths, validation_fraction=fraction, **source
    )


def by_hash(documents: int) -> list[int]:
    """The numbers of the documents, those first that the seed 0 holds out first."""

    def hashed(number: int) -> int:
        digest = hashlib.blake2b(f"0:id:talk-{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    return sorted(range(documents), key=hashed)


def test_one_of_sixty_documents_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus(tmp_path / "a.jsonl", 60)
    cfg = config(tmp_path / "data", path, 0.01)
    manifest = prepare(cfg)
    assert (manifest.train.documents, manifest.validation.documents) == (59, 1)
    assert read_texts(tmp_path / "data", "validation") == [f"document {by_hash(60)[0]}."]
    said = "validation_fraction=0.01 chose none of 60 documents; one document is held out for validation"
    assert said in (read_manifest(tmp_path / "data").split_note or "")
    assert capsys.readouterr().out.count(said) == 1
    prepare(cfg)
    again = capsys.readouterr().out
    assert "already prepared" in again
    assert said in again


def test_one_of_sixty_documents_is_left_for_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = prepare(config(tmp_path / "data", corpus(tmp_path / "a.jsonl", 60), 1 - 1e-9))
    assert (manifest.train.documents, manifest.validation.documents) == (1, 59)
    assert read_texts(tmp_path / "data", "train") == [f"document {by_hash(60)[-1]}."]
    assert "chose all 60 documents for validation; one document is left" in capsys.readouterr().out


@pytest.mark.parametrize("fraction", [0.01, 1 - 1e-9])
def test_a_single_document_is_trained_on(
    tmp_path: Path, fraction: float, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = prepare(config(tmp_path / "data", corpus(tmp_path / "a.jsonl", 1), fraction))
    assert (manifest.train.documents, manifest.validation.documents) == (1, 0)
    assert "there is only one document, so none is held out" in capsys.readouterr().out
    assert (manifest.split_note or "").endswith("so none is held out for validation")


def test_the_manifest_of_a_corpus_that_the_fraction_divides_has_no_note(tmp_path: Path) -> None:
    prepare(config(tmp_path / "data", corpus(tmp_path / "a.jsonl", 60), 0.2))
    assert "split_note" not in json.loads((tmp_path / "data" / "manifest.json").read_text())


def test_the_result_is_that_of_a_fraction_that_chooses_one(tmp_path: Path) -> None:
    """The tokenizer, too, is trained on the training split alone."""
    path = corpus(tmp_path / "a.jsonl", 60)
    prepare(config(tmp_path / "small", path, 0.01))
    digest = hashlib.blake2b(f"0:id:talk-{by_hash(60)[0]}".encode(), digest_size=8).digest()
    fraction = (int.from_bytes(digest, "little") + 10**6) / 2**64
    prepare(config(tmp_path / "chosen", path, fraction))
    small, chosen = contents(tmp_path / "small"), contents(tmp_path / "chosen")
    assert {**small, "manifest.json": b""} == {**chosen, "manifest.json": b""}


def test_an_interrupted_run_continues_with_the_document_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted while it encodes for the second time, with the first batches saved."""
    path = corpus(tmp_path / "a.jsonl", 60)
    limits = Limits(batch_bytes=100, save_seconds=0.0)
    prepare(config(tmp_path / "whole", path, 0.01), limits)
    read, calls = pipeline.read_batches, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        for number, batch in enumerate(read(*arguments)):
            if calls == 4 and number == 10:  # trained, encoded, trained, encoded
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path / "data", path, 0.01), limits)
    capsys.readouterr()
    prepare(config(tmp_path / "data", path, 0.01), limits)
    assert "continuing after" in capsys.readouterr().out
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_documents_that_share_an_id_are_refused(tmp_path: Path) -> None:
    path = corpus(tmp_path / "a.jsonl", 60, id="same")
    for fraction in (0.01, 1 - 1e-9):
        with pytest.raises(UserError, match=r"all 60 documents have the same id(.|\n)*id_field=null"):
            prepare(config(tmp_path / "data", path, fraction))
    prepare(config(tmp_path / "data", path, 0.01, id_field=None))


def test_validation_files_without_a_document_are_refused(tmp_path: Path) -> None:
    """The fraction has no part in it, so the message does not name it."""
    path = corpus(tmp_path / "a.jsonl", 60)
    held = corpus(tmp_path / "b.jsonl", 0)
    cfg = config(tmp_path / "data", path, 0.05, validation_paths=[str(held)])
    with pytest.raises(UserError, match=r"no document of 60 is in the files of the validation split"):
        prepare(cfg)
