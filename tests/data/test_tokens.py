"""Reading prepared tokens: across shards, and every way in which the files can be wrong."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olmoe_train.data.manifest import read_manifest
from olmoe_train.data.tokens import open_split, verify_hashes
from olmoe_train.utils.errors import UserError
from tests.support.data import EOS, add_loss_mask, write_prepared

DOCUMENTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14, 15, 16], [17]]
TOKENS = [token for document in DOCUMENTS for token in [*document, EOS]]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Shards of at most 6 tokens: (4 + 2), (3), (7: longer than a shard, alone), (2)."""
    return write_prepared(tmp_path / "data", DOCUMENTS, validation=[[20, 21]], shard_tokens=6)


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_shards_hold_whole_documents_and_their_ends(prepared: Path) -> None:
    shards = read_manifest(prepared).train.shards
    assert [shard.tokens for shard in shards] == [6, 3, 7, 2]
    ends = [np.fromfile(prepared / shard.ends_path, "<u8").tolist() for shard in shards]
    assert ends == [[4, 6], [3], [7], [2]]
    raw = b"".join((prepared / shard.path).read_bytes() for shard in shards)
    assert raw == b"".join(token.to_bytes(2, "little") for token in TOKENS)


def test_any_span_reads_the_same_whatever_the_shards(prepared: Path) -> None:
    split = open_split(prepared, "train")
    assert len(split) == len(TOKENS) == 18
    for start in range(19):
        for stop in range(start, 19):
            assert split.read(start, stop).tolist() == TOKENS[start:stop]
    assert split.read(0, 18).dtype == np.int64


def test_document_starts_of_any_span(prepared: Path) -> None:
    split = open_split(prepared, "train")
    firsts = [4, 6, 9, 16]  # of the documents after the first
    for start in range(19):
        for stop in range(start, 19):
            expected = [first for first in firsts if start < first < stop]
            assert split.document_starts(start, stop).tolist() == expected


@pytest.mark.parametrize("documents", [1, 2, 3, 5, 9])
def test_documents_come_in_windows_across_shards(prepared: Path, documents: int) -> None:
    windows = list(open_split(prepared, "train").document_windows(documents))
    spans = [span for starts, stops in windows for span in zip(starts.tolist(), stops.tolist(), strict=True)]
    assert spans == [(0, 4), (4, 6), (6, 9), (9, 16), (16, 18)]
    assert [len(starts) for starts, _ in windows[:-1]] == [documents] * (len(windows) - 1)


def test_a_document_index_that_ends_elsewhere_is_damaged(prepared: Path) -> None:
    np.array([6], "<u8").tofile(prepared / "train/shard-00002.ends.u64")
    with pytest.raises(
        UserError, match=r"shard-00002\.ends\.u64: its last document does not end at the end of"
    ):
        list(open_split(prepared, "train").document_windows(2))


def test_loss_mask(prepared: Path, tmp_path: Path) -> None:
    assert not open_split(prepared, "train").has_mask
    assert open_split(prepared, "train").read_mask(3, 8).tolist() == [True] * 5
    add_loss_mask(prepared, "validation", [0, 1, 0])
    split = open_split(prepared, "validation")
    assert split.has_mask
    assert split.read_mask(0, 3).tolist() == [False, True, False]
    assert split.read_mask(1, 2).tolist() == [True]
    assert verify_hashes(prepared) == 11
    path = prepared / "validation/shard-00000.mask.u8"
    path.write_bytes(bytes([1, 1, 0]))
    with pytest.raises(UserError, match=r"mask\.u8: its contents changed"):
        verify_hashes(prepared)
    path.write_bytes(bytes([1, 1]))
    with pytest.raises(UserError, match=r"mask\.u8: 2 bytes, but manifest\.json says 3"):
        open_split(prepared, "validation")


def test_large_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    directory = write_prepared(tmp_path / "data", [[70_000, 3]], vocab_size=100_000, dtype="uint32")
    assert open_split(directory, "train").read(0, 3).tolist() == [70_000, 3, EOS]
    assert (directory / "train/shard-00000.npy").stat().st_size == 12


def test_a_pickled_split_carries_no_tokens(tmp_path: Path) -> None:
    """Loader workers that are not forked are sent a copy. A memory map in it would be all of its shard."""
    document = list(range(2, 50_002))
    split = open_split(write_prepared(tmp_path / "data", [document], vocab_size=60_000), "train")
    assert split.read(0, 3).tolist() == [2, 3, 4]
    sent = pickle.dumps(split)
    assert len(sent) < 5_000
    assert pickle.loads(sent).read(0, 50_001).tolist() == [*document, EOS]  # noqa: S301  written above


def test_missing_directory_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.dir=.*nowhere: no prepared data(.|\n)*olmoe prepare .*nowhere"
    ):
        open_split(tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    "name", ["train/shard-00001.npy", "train/shard-00001.ends.u64", "tokenizer/tokenizer.json"]
)
def test_missing_file_is_named(prepared: Path, name: str) -> None:
    (prepared / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing(.|\n)*olmoe prepare"):
        open_split(prepared, "train")


@pytest.mark.parametrize("name", ["train/shard-00002.npy", "train/shard-00002.ends.u64"])
def test_truncated_file_is_named(prepared: Path, name: str) -> None:
    path = prepared / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=rf"{name}: {size - 1} bytes, but manifest\.json says {size}(.|\n)*olmoe prepare"
    ):
        open_split(prepared, "train")


def test_token_beyond_the_vocabulary_is_found_when_read(prepared: Path) -> None:
    tokens = np.fromfile(prepared / "train/shard-00002.npy", "<u2")
    tokens[4] = 1000
    tokens.tofile(prepared / "train/shard-00002.npy")
    split = open_split(prepared, "train")
    assert split.read(0, 13).tolist() == TOKENS[:13]
    with pytest.raises(UserError, match=r"shard-00002\.npy: token 4 is 1000, beyond the vocabulary of 1,000"):
        split.read(12, 14)


def test_changed_contents_are_found_on_request(prepared: Path) -> None:
    assert verify_hashes(prepared) == 10
    path = prepared / "validation/shard-00000.npy"
    path.write_bytes(bytes([22]) + path.read_bytes()[1:])
    open_split(prepared, "validation")  # sizes and ids are still right
    with pytest.raises(UserError, match=r"validation/shard-00000\.npy: its contents changed"):
        verify_hashes(prepared)


def test_another_tokenizer_is_refused(prepared: Path) -> None:
    (prepared / "tokenizer/tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json: not the tokenizer that the tokens were made with"):
        open_split(prepared, "train")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format="other"), "format is 'other'"),
        (lambda m: m.update(version=2), "version is 2"),
        (lambda m: m.pop("eos_token_id"), "no 'eos_token_id'"),
        (lambda m: m.update(dtype="int8"), "dtype is 'int8'"),
        (lambda m: m.update(vocab_size=70_000), "70000 does not fit dtype uint16"),
        (lambda m: m.update(vocab_size="many"), "not supported between"),
        (lambda m: m.update(eos_token_id=1000), "eos_token_id is 1000, outside the vocabulary of 1000"),
        (lambda m: m["train"].update(tokens=17), "train.tokens is 17, but its shards add up to 18"),
        (lambda m: m["train"].update(documents=6), "train.documents is 6, but its shards add up to 5"),
        (lambda m: m["train"]["shards"][0].update(path="../../etc/passwd"), "leaves the prepared directory"),
        (lambda m: m["train"]["shards"][0].update(ends_path="/etc/passwd"), "leaves the prepared directory"),
        (
            lambda m: m["train"]["shards"][0].update(mask_path="../mask"),
            "has only one of mask_path and mask_sha256",
        ),
        (
            lambda m: m["train"]["shards"][0].update(mask_path="../mask", mask_sha256=""),
            "leaves the prepared directory",
        ),
        (lambda m: m["train"]["shards"][0].pop("sha256"), "sha256"),
    ],
)
def test_edited_manifest(prepared: Path, change: Callable[[dict[str, Any]], None], reason: str) -> None:
    edit_manifest(prepared, change)
    with pytest.raises(UserError, match=rf"manifest\.json: not a manifest of this program: .*{reason}"):
        open_split(prepared, "train")


def test_wrong_dtype_in_the_manifest_contradicts_the_file_sizes(prepared: Path) -> None:
    edit_manifest(prepared, lambda manifest: manifest.update(dtype="uint32"))
    with pytest.raises(UserError, match=r"shard-00000\.npy: 12 bytes, but manifest\.json says 24"):
        open_split(prepared, "train")


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"format": '])
def test_manifest_that_is_not_one(prepared: Path, text: str) -> None:
    (prepared / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of this program"):
        read_manifest(prepared)
