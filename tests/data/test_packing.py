"""Best-fit packing: every token once, documents whole, as tight as the textbook's, the same for ever."""

import itertools
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olmoe_train.data import packing
from olmoe_train.data.packing import Packs, best_fit_decreasing, open_packs, pack_documents, write_index
from olmoe_train.data.tokens import open_split
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared


def gaps_of_the_textbook(lengths: list[int], capacity: int) -> list[int]:
    """What each bin has left, one item after the other."""
    gaps: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, gap in enumerate(gaps) if gap >= length]
        if fitting:
            gaps[min(fitting, key=lambda index: gaps[index])] -= length
        else:
            gaps.append(capacity - length)
    return sorted(gaps)


def test_bins_are_as_full_as_the_textbook_fills_them() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        capacity, items = int(generator.integers(1, 40)), int(generator.integers(1, 60))
        lengths = generator.integers(1, capacity + 1, items)
        bins = best_fit_decreasing(lengths, capacity)
        gaps = capacity - np.bincount(bins, weights=lengths)
        assert sorted(gaps.tolist()) == gaps_of_the_textbook(lengths.tolist(), capacity)


def all_packs(packs: Packs) -> list[list[tuple[int, int]]]:
    return [packs[i] for i in range(len(packs))]


def pack(lengths: list[int], capacity: int) -> list[list[tuple[int, int]]]:
    stops = np.cumsum(lengths)
    pieces, ends = pack_documents(stops - lengths, stops, capacity)
    return [[tuple(piece) for piece in part.tolist()] for part in np.split(pieces, ends)[:-1]]


def test_by_hand() -> None:
    # Of 8: the 20 fills two and leaves 4; then 5 alone, 4 and 4 together, 3 to the 5, 2 in one of its own.
    packs = pack([5, 20, 3, 4, 2], 8)
    assert packs == [[(0, 5), (25, 28)], [(5, 13)], [(13, 21)], [(21, 25), (28, 32)], [(32, 34)]]


def test_golden_vectors() -> None:
    """Frozen: a change here changes the samples of every resumed run. Rename ALGORITHM if it has to be."""
    lengths = [3, 9, 1, 4, 4, 2, 7, 3, 5, 1]
    assert best_fit_decreasing(np.array(lengths), 10).tolist() == [1, 0, 2, 2, 3, 3, 1, 3, 2, 3]
    assert pack(lengths, 6) == [
        [(0, 3), (9, 12)],
        [(3, 9)],
        [(12, 13), (33, 38)],
        [(13, 17), (29, 30), (38, 39)],
        [(17, 21), (21, 23)],
        [(23, 29)],
        [(30, 33)],
    ]


@pytest.mark.parametrize("capacity", [1, 2, 7, 64])
def test_every_token_is_in_one_pack_and_documents_stay_whole(capacity: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 40, 500).tolist()
    stops = np.cumsum(lengths).tolist()
    documents = list(zip([0, *stops[:-1]], stops, strict=True))
    packs = pack(lengths, capacity)
    pieces = sorted(piece for part in packs for piece in part)
    expected: list[tuple[int, int]] = []
    for start, stop in documents:
        cuts = [*range(start, stop, capacity), stop]
        expected += itertools.pairwise(cuts)
    assert pieces == expected
    assert all(sum(stop - start for start, stop in part) <= capacity for part in packs)
    assert all(part == sorted(part) for part in packs)
    assert [part[0] for part in packs] == sorted(part[0] for part in packs)


DOCUMENTS = [[7] * n for n in (4, 19, 2, 3, 1, 8, 6, 2, 30, 1, 1, 5)]


def prepared(directory: Path, shard_tokens: int = 10**9) -> Path:
    return write_prepared(directory, DOCUMENTS, DOCUMENTS[:3], shard_tokens=shard_tokens)


def test_the_index_is_that_of_its_windows_whatever_the_shards(tmp_path: Path) -> None:
    lengths = [len(document) + 1 for document in DOCUMENTS]
    expected, offset = [], 0
    for window in (lengths[:5], lengths[5:10], lengths[10:]):
        expected += [[(a + offset, b + offset) for a, b in part] for part in pack(window, 8)]
        offset += sum(window)
    for shard_tokens in (10**9, 20):
        split = open_split(prepared(tmp_path / str(shard_tokens), shard_tokens), "train")
        write_index(split, 8, tmp_path / f"index-{shard_tokens}", window=5)
        packs = Packs(tmp_path / f"index-{shard_tokens}")
        assert all_packs(packs) == expected


def test_the_index_is_made_once_and_again_for_other_lengths_splits_and_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = prepared(tmp_path / "data")
    made = []
    build = packing.pack_documents

    def note(*arguments: Any) -> Any:
        made.append(arguments[2])
        return build(*arguments)

    monkeypatch.setattr(packing, "pack_documents", note)
    train, validation = open_split(directory, "train"), open_split(directory, "validation")
    for split, length in ((train, 8), (train, 8), (train, 9), (validation, 8), (train, 8)):
        open_packs(split, length)
    assert made == [8, 9, 8]
    other = write_prepared(tmp_path / "other", DOCUMENTS[::-1])
    (directory / "packing").rename(other / "packing")
    open_packs(open_split(other, "train"), 8)
    assert made == [8, 9, 8, 8]


def test_processes_that_start_together_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = open_split(prepared(tmp_path / "data"), "train")
    made = []
    build = packing.write_index

    def note(*arguments: Any) -> Any:
        made.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(packing, "write_index", note)
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(len(open_packs(split, 8)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(set(results)) == 1
    assert len(results) == 4


def test_an_index_left_half_written_is_made_anew(tmp_path: Path) -> None:
    split = open_split(prepared(tmp_path / "data"), "train")
    expected = all_packs(open_packs(split, 8))
    (final,) = (split.directory / "packing").glob("best_fit*")
    partial = final.rename(final.with_name(f".{final.name}.0123abcd.partial"))
    (partial / "pieces.u64").write_bytes(b"torn")
    assert all_packs(open_packs(split, 8)) == expected
    assert sorted(path.name for path in final.parent.iterdir()) == [final.name, "lock"]


def test_a_copied_index_carries_no_maps(tmp_path: Path) -> None:
    packs = open_packs(open_split(prepared(tmp_path / "data"), "train"), 8)
    packs[0]
    assert len(pickle.dumps(packs)) < 1000
    assert pickle.loads(pickle.dumps(packs))[0] == packs[0]  # noqa: S301


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    split = open_split(prepared(tmp_path / "data"), "train")
    (open_packs(split, 8).directory / "pieces.u64").write_bytes(bytes(16))
    with pytest.raises(
        UserError,
        match=r"best_fit-v1-train-8-[0-9a-f]{16}: the index of packed sequences is damaged(.|\n)*Delete it",
    ):
        open_packs(split, 8)


def test_where_the_index_cannot_be_written(tmp_path: Path) -> None:
    directory = prepared(tmp_path / "data")
    (directory / "packing").write_text("a file in its place")
    with pytest.raises(
        UserError, match=r"packing, which cannot be written(.|\n)*Make the directory writable"
    ):
        open_packs(open_split(directory, "train"), 8)
