"""Document-aware sequences: which documents share one, by best-fit-decreasing bin packing.

Documents stay whole (Ding et al. 2024, "Fewer truncations improve language modeling", arXiv 2404.10830): one
that is longer than the sequence is cut into full sequences and a rest, rests and short documents are packed,
and what is left of a sequence is padding. Packed are WINDOW documents at a time, in the order of the data, so
that memory does not grow with it. The result is an index on disk, made once by the first process that needs
it and read through memory maps:

DIR/packing/best_fit-v1-train-4096-HASH/pieces.u64    pairs (start, stop), in tokens of the split
                                        packs.u64     for each pack, where its pieces end
"""

import fcntl
import hashlib
import logging
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from olmoe_train.data.tokens import TokenSplit
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import sync

ALGORITHM = "best_fit-v1"
"""Part of the loader's fingerprint and of the index's name: change it whenever a pack would be another."""

WINDOW = 1 << 18
_U64 = np.dtype("<u8")

log = logging.getLogger("olmoe")


class Packs:
    """Pack i is pieces of documents, (start, stop) in tokens of the split, together at most a sequence."""

    def __init__(self, directory: Path):
        self.directory = directory
        if len(self) == 0 or int(self._ends[-1]) * 2 != len(self._pieces):
            raise UserError(
                f"{directory}: a damaged index of packed sequences.\n  Delete it: it is made anew."
            )

    @cached_property
    def _pieces(self) -> np.ndarray:
        return np.memmap(self.directory / "pieces.u64", _U64, mode="r")

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.memmap(self.directory / "packs.u64", _U64, mode="r")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> list[tuple[int, int]]:
        first = int(self._ends[index - 1]) if index > 0 else 0
        pieces = self._pieces[2 * first : 2 * int(self._ends[index])].tolist()
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps would be pickled as their contents; loader workers open their own.
        return {"directory": self.directory}


def open_packs(split: TokenSplit, sequence_length: int) -> Packs:
    """The packs of a split, which has tokens. UserError where the index is missing and cannot be written."""
    shards = "".join(shard.ends_sha256 for shard in split.shards)
    digest = hashlib.sha256(shards.encode()).hexdigest()[:16]
    indexes = split.directory / "packing"
    final = indexes / f"{ALGORITHM}-{split.name}-{sequence_length}-{digest}"
    if not final.is_dir():
        try:
            indexes.mkdir(exist_ok=True)
            with (indexes / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # ranks start together: one works, the others wait for it
                if not final.is_dir():
                    _write_index(split, sequence_length, final)
        except OSError as error:
            raise UserError(
                f"data.packing=best_fit keeps its index in {indexes}, which cannot be written: {error}\n"
                "  Make it writable, or copy the prepared data to where it is."
            ) from error
    return Packs(final)


def _write_index(split: TokenSplit, sequence_length: int, final: Path) -> None:
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    packs = pieces = 0
    with (partial / "pieces.u64").open("wb") as pieces_file, (partial / "packs.u64").open("wb") as packs_file:
        for starts, stops in split.document_windows(WINDOW):
            window_pieces, window_ends = pack_documents(starts, stops, sequence_length)
            _append(pieces_file, window_pieces)
            _append(packs_file, window_ends + pieces)
            packs, pieces = packs + len(window_ends), pieces + len(window_pieces)
    for path in (*partial.iterdir(), partial):
        sync(path)
    partial.rename(final)
    sync(final.parent)
    log.info(
        f"packed {final.parent.parent}/{split.name}: {packs:,} sequences of {sequence_length:,}, "
        f"{1 - len(split) / (packs * sequence_length):.2%} of them padding"
    )


def _append(file: BinaryIO, values: np.ndarray) -> None:
    file.write(values.astype(_U64).tobytes())


def pack_documents(
    starts: np.ndarray, stops: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(pieces [P, 2], where each pack's pieces end [packs]) of documents [starts, stops), all int64.

    Packs are in the order of their first tokens, and so are the pieces of a pack.
    """
    full = (stops - starts) // sequence_length  # sequences that a document fills alone
    before = np.repeat(np.cumsum(full) - full, full)
    cut = np.repeat(starts, full) + (np.arange(full.sum()) - before) * sequence_length
    rest = starts + full * sequence_length
    rest, rest_stops = rest[rest < stops], stops[rest < stops]
    bins = best_fit_decreasing(rest_stops - rest, sequence_length)

    first = np.concatenate([rest, cut])
    last = np.concatenate([rest_stops, cut + sequence_length])
    pack = np.concatenate([bins, np.arange(len(cut)) + (bins.max(initial=-1) + 1)])
    opening = np.full(pack.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(opening, pack, first)
    order = np.lexsort((first, opening[pack]))
    ends = np.cumsum(np.bincount(pack)[np.argsort(opening)])
    return np.stack([first[order], last[order]], axis=1), ends


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, numbered from 0: longest items first, each into the fullest bin that it fits.

    lengths: int64 [n], 0 < length <= capacity. Items of one length are placed together. The fullest bin that
    takes one of them takes as many as fit: what they leave is a smaller gap still.
    """
    bins = np.empty(len(lengths), np.int64)
    bins_by_gap: list[list[int]] = [[] for _ in range(capacity + 1)]
    gaps = 0  # bit g: there is a bin with exactly g left
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    for length, count, end in zip(
        (-values).tolist(), counts.tolist(), np.cumsum(counts).tolist(), strict=True
    ):
        left = count
        while left:
            wide_enough = gaps >> length
            gap = length + (wide_enough & -wide_enough).bit_length() - 1 if wide_enough else capacity
            per_bin = gap // length
            wanted = -(-left // per_bin)
            if wide_enough:
                taken = bins_by_gap[gap][-wanted:]
                del bins_by_gap[gap][-wanted:]
                if not bins_by_gap[gap]:
                    gaps &= ~(1 << gap)
            else:
                taken = list(range(opened, opened + wanted))
                opened += wanted
            placed = np.repeat(taken, per_bin)[:left]
            bins[order[end - left : end - left + len(placed)]] = placed
            in_last = len(placed) - (len(taken) - 1) * per_bin
            for rest, group in ((gap - per_bin * length, taken[:-1]), (gap - in_last * length, taken[-1:])):
                if group:
                    bins_by_gap[rest] += group
                    gaps |= 1 << rest
            left -= len(placed)
    return bins
