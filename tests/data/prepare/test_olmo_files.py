"""Token files of dolma and OLMo, indexed and read where they are."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olmoe_train.config.choices import DataFormat, Packing, TokenDtype
from olmoe_train.config.data import DataConfig, OlmoFilesConfig, SourceConfig, TokenizerConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import TrainingData, build_eval_batches, build_train_loader
from olmoe_train.data.manifest import read_manifest
from olmoe_train.data.mixture import verify
from olmoe_train.data.prepare.corpus import find_files
from olmoe_train.data.prepare.olmo_files import TokenFormat, index_olmo_files, index_token_file
from olmoe_train.data.tokens import open_split
from olmoe_train.utils.errors import UserError
from tests.support.chat_templates import TULU_3, write_tokenizer
from tests.support.data import EOS, contents, write_prepared

DOCUMENTS = [[5, 6, EOS], [7, EOS], [EOS], [8, 9, 10, EOS], [11, 12]]  # the last of a file may have no eos


def write_tokens(path: Path, documents: list[list[int]], dtype: str = "<u2") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.array([token for document in documents for token in document], dtype).tofile(path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "olmo"
    write_tokens(root / "part-0.npy", DOCUMENTS)
    write_tokens(root / "deep/part-1.npy", DOCUMENTS[:2])
    write_tokens(root / "held/out.npy", [[20, 21, EOS], [22, EOS]])
    (root / "part-0.csv.gz").write_bytes(b"no tokens")
    return root


def config(directory: Path, files: Path, tokenizer: Path | None = None, **options: Any) -> PrepareConfig:
    values: dict[str, Any] = {"eos_token_id": EOS, "vocab_size": 100}
    values |= {key: options.pop(key) for key in ("dtype", "eos_token_id", "vocab_size") if key in options}
    source = {"paths": [str(files)], "validation_paths": [f"{files}/held"], "processes": 1, **options}
    return PrepareConfig(
        data=DataConfig(
            dir=str(directory),
            format=DataFormat.olmo,
            olmo=OlmoFilesConfig(**values),
            source=SourceConfig(**source),
        ),
        tokenizer=TokenizerConfig(path=str(tokenizer) if tokenizer else None),
    )


def test_documents_are_found_and_nothing_is_copied(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = index_olmo_files(config(tmp_path / "data", files))
    assert (manifest.train.documents, manifest.train.tokens) == (7, 17)
    assert (manifest.validation.documents, manifest.validation.tokens) == (2, 5)
    split = open_split(tmp_path / "data", "train")
    expected = [DOCUMENTS[:2], DOCUMENTS]  # files in order of their names: deep/part-1, part-0
    flat = [token for part in expected for document in part for token in document]
    assert split.read(0, 17).tolist() == flat
    [(starts, stops)] = split.document_windows(100)
    found = [flat[start:stop] for start, stop in zip(starts, stops, strict=True)]
    assert found == [document for part in expected for document in part]
    names = sorted(contents(tmp_path / "data"))
    assert names == [
        "manifest.json",
        "train/shard-00000.ends.u64",
        "train/shard-00002.ends.u64",
        "validation/shard-00001.ends.u64",
    ]
    assert f"indexed {tmp_path}/data" in capsys.readouterr().out
    assert index_olmo_files(config(tmp_path / "data", files)) == manifest
    assert "already indexed, nothing to do" in capsys.readouterr().out
    index_olmo_files(config(tmp_path / "two", files, processes=2))
    assert contents(tmp_path / "two") == contents(tmp_path / "data")


def test_any_block_finds_the_same_documents(files: Path, tmp_path: Path) -> None:
    [file] = find_files([str(files / "part-0.npy")], [])
    tokens = TokenFormat("uint16", EOS, 100)
    found = []
    for block in (1, 2, 3, 5, 100):  # documents end inside of blocks, and with them
        shard, counts = index_token_file(tmp_path, tokens, file, "ends", block_tokens=block)
        found.append((shard, counts.tolist(), np.fromfile(tmp_path / "ends", "<u8").tolist()))
    assert all(one == found[0] for one in found)
    assert found[0][2] == [3, 5, 6, 10, 12]


@pytest.mark.parametrize("packing", Packing)
def test_the_loader_takes_it_as_any_prepared_data(files: Path, tmp_path: Path, packing: Packing) -> None:
    whole = [*DOCUMENTS[:4], [11, 12, EOS]]
    write_tokens(files / "part-0.npy", whole)
    index_olmo_files(config(tmp_path / "olmo-index", files))
    documents = [document[:-1] for document in [*DOCUMENTS[:2], *whole]]
    write_prepared(tmp_path / "ours", documents, [[20, 21], [22]], vocab_size=100, pad_token_id=None)
    batches: list[list[dict[str, torch.Tensor]]] = []
    for name in ("olmo-index", "ours"):
        data = DataConfig(dir=str(tmp_path / name), sequence_length=5, packing=packing)
        loader = build_train_loader(TrainingData(data, 0), 0, BatchSizes(2), 0, 1, 2)
        batches.append([*itertools.islice(loader, 4), *build_eval_batches(data, 0, 1, 2)])
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert TrainingData(DataConfig(dir=str(tmp_path / "olmo-index")), 0).fingerprint()["train_tokens"] == 18


def test_with_a_tokenizer(files: Path, tmp_path: Path) -> None:
    """It says eos and vocabulary, and goes along into exports."""
    tokenizer = write_tokenizer(tmp_path / "hf", TULU_3)
    cfg = config(tmp_path / "data", files, tokenizer, eos_token_id=None, vocab_size=None)
    manifest = index_olmo_files(cfg)
    assert (manifest.eos_token_id, manifest.pad_token_id) == (1, 2)
    assert manifest.vocab_size > 300
    assert contents(tmp_path / "data/tokenizer") == contents(tokenizer)
    assert manifest.train.documents == 2  # no file has token 1: each is a document


def test_uint32(tmp_path: Path) -> None:
    files = tmp_path / "olmo"
    write_tokens(files / "a.npy", [[70_000, 5, EOS]], "<u4")
    options: dict[str, Any] = {"dtype": TokenDtype.uint32, "vocab_size": 100_278, "validation_paths": []}
    manifest = index_olmo_files(config(tmp_path / "data", files, **options))
    assert open_split(tmp_path / "data", "train").read(0, 3).tolist() == [70_000, 5, EOS]
    assert manifest.validation.tokens == 0


def test_files_that_are_no_such_tokens(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    (files / "x.npy").write_bytes(b"\1\2\3")
    with pytest.raises(
        UserError, match=r"x\.npy: 3 bytes, which is not a whole, positive number of uint16 tokens"
    ):
        index_olmo_files(config(out, files))
    (files / "x.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.npy: 0 bytes"):
        index_olmo_files(config(out, files))
    np.save(files / "x.npy", np.array([1, 2, 3], np.uint16))
    with pytest.raises(UserError, match=r"x\.npy: has NumPy's header"):
        index_olmo_files(config(out, files))
    write_tokens(files / "x.npy", [[1, 2, 100, 4]])
    with pytest.raises(UserError, match=r"x\.npy: token 2 is 100, beyond the vocabulary of 100"):
        index_olmo_files(config(out, files))
    assert not out.exists()
    with pytest.raises(UserError, match=r"data\.source\.paths: no file is called or matches .*nowhere"):
        index_olmo_files(config(out, files / "nowhere", validation_paths=[]))


def test_keys(files: Path, tmp_path: Path) -> None:
    for options, message in (
        (
            {"eos_token_id": None},
            r"data\.olmo\.eos_token_id and data\.olmo\.vocab_size: the files do not say",
        ),
        ({"eos_token_id": 100}, r"eos_token_id=100, vocab_size=100: must be 0 <= eos < vocab_size <= 65536"),
        ({"vocab_size": 70_000}, r"vocab_size=70000: must be"),
        ({"paths": [], "validation_paths": []}, r"data\.source\.paths=\[\]: give token files"),
        ({"text_field": "body"}, r"data\.source\.text_field=body: has no effect with data\.format=olmo"),
    ):
        with pytest.raises(UserError, match=message):
            index_olmo_files(config(tmp_path / "data", files, **options))


def test_files_that_changed_since(files: Path, tmp_path: Path) -> None:
    index_olmo_files(config(tmp_path / "data", files))
    data = DataConfig(dir=str(tmp_path / "data"), format=DataFormat.olmo)
    checked = DataConfig(dir=str(tmp_path / "data"), verify_hashes=True)
    verify(checked)
    path = files / "part-0.npy"
    path.write_bytes(b"\6" + path.read_bytes()[1:])
    verify(data)
    with pytest.raises(UserError, match=r"part-0\.npy: its contents changed"):
        verify(checked)
    write_tokens(path, DOCUMENTS[:3])
    with pytest.raises(UserError, match=r"part-0\.npy: 12 bytes, but manifest\.json says 24"):
        open_split(tmp_path / "data", "train")
    with pytest.raises(UserError, match=r"other settings:\n    corpus: "):
        index_olmo_files(config(tmp_path / "data", files))


def test_only_the_tokens_may_lie_elsewhere(files: Path, tmp_path: Path) -> None:
    index_olmo_files(config(tmp_path / "data", files))
    path = tmp_path / "data/manifest.json"
    record = json.loads(path.read_text())
    record["train"]["shards"][0]["ends_path"] = "/etc/passwd"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="'/etc/passwd' leaves the prepared directory"):
        read_manifest(tmp_path / "data")


def test_format_olmo_for_data_that_is_not(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", [[5, 6]])
    with pytest.raises(UserError, match=r"data\.format=olmo: .*data holds its own tokens"):
        verify(DataConfig(dir=str(tmp_path / "data"), format=DataFormat.olmo))
