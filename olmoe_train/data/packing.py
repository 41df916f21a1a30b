"""Packs whole documents into sequences, by best-fit-decreasing bin packing (data.packing=best_fit).

Documents stay whole (Ding et al. 2024, "Fewer truncations improve language modeling", arXiv 2404.10830). A
document that is longer than the sequence is cut into full sequences and a remainder. Remainders and short
documents are packed, and the space left in a sequence is padding. Documents are packed in windows of
WINDOW, in the order of the data, so that memory does not grow with the data. The result is an index on
disk. The first process that needs it writes it once, and all read it through memory maps:

DIR/packing/best_fit-v1-train-4096-HASH/pieces.u64    pairs (start, stop), in tokens of the split
                                        packs.u64     for each pack, the end of its pieces in pieces.u64
"""

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from olmoe_train.data.tokens import TokenSplit
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_directory, file_lock

ALGORITHM = "best_fit-v1"
"""Part of the data fingerprint and of the index's name. Change it whenever the packs change."""
WINDOW = 1 << 18
"""Documents that are packed together."""
_U64 = np.dtype("<u8")

log = logging.getLogger(__name__)


class Packs:
    """The packs of a split: pack i is a list of document pieces (start, stop), in tokens of the split.

    The pieces of a pack have at most as many tokens as a sequence.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        if len(self) == 0 or int(self._ends[-1]) * 2 != len(self._pieces):
            raise UserError(
                f"{directory}: the index of packed sequences is damaged.\n  Delete it: it is built again."
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
        # Pickling a memory map would copy all of its contents. Loader workers open their own maps.
        return {"directory": self.directory}


def open_packs(split: TokenSplit, sequence_length: int) -> Packs:
    """Open the packs of a split, and build their index first if it is missing.

    Args:
        split: The documents. It must have tokens.
        sequence_length: Tokens per sequence.

    Raises:
        UserError: The index is missing and cannot be written, or it is damaged.
    """
    shards = "".join(shard.ends_sha256 for shard in split.shards)
    digest = hashlib.sha256(shards.encode()).hexdigest()[:16]
    indexes = split.directory / "packing"
    final = indexes / f"{ALGORITHM}-{split.name}-{sequence_length}-{digest}"
    if not final.is_dir():
        try:
            indexes.mkdir(exist_ok=True)
            with file_lock(indexes / "lock"):  # ranks start together: one builds, the others wait
                if not final.is_dir():
                    write_index(split, sequence_length, final)
        except OSError as error:
            raise UserError(
                f"data.packing=best_fit keeps its index in {indexes}, which cannot be written: {error}\n"
                "  Make the directory writable, or copy the prepared data to one that is."
            ) from error
    return Packs(final)


def write_index(split: TokenSplit, sequence_length: int, final: Path, window: int = WINDOW) -> None:
    """Pack the documents of a split, `window` documents at a time, and write the index to `final`."""
    packs = pieces = 0
    with (
        atomic_directory(final) as partial,
        (partial / "pieces.u64").open("wb") as piece_file,
        (partial / "packs.u64").open("wb") as pack_file,
    ):
        for starts, stops in split.document_windows(window):
            window_pieces, window_ends = pack_documents(starts, stops, sequence_length)
            _append(piece_file, window_pieces)
            _append(pack_file, window_ends + pieces)
            packs, pieces = packs + len(window_ends), pieces + len(window_pieces)
    log.info(
        f"packed {final.parent.parent}/{split.name}: {packs:,} sequences of {sequence_length:,} tokens, "
        f"{1 - len(split) / (packs * sequence_length):.2%} of them padding"
    )


def _append(file: BinaryIO, values: np.ndarray) -> None:
    file.write(values.astype(_U64).tobytes())


def pack_documents(
    starts: np.ndarray, stops: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pack the documents [starts, stops) into sequences.

    Args:
        starts: First token of each document, int64 [documents].
        stops: Last token + 1 of each document, int64 [documents].
        sequence_length: Tokens per sequence.

    Returns:
        (pieces, ends), int64 [pieces, 2] and [packs]: (start, stop) of each piece, and for each pack the
        end of
        its pieces. Packs are in the order of their first tokens, and so are the pieces of a pack.
    """
    full = (stops - starts) // sequence_length  # sequences that a document fills on its own
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
    """Assign items to bins: from the longest item on, each goes into the fullest bin that has room for it.

    Items of the same length are placed together. The fullest bin with room for one of them receives as many
    as fit, because each one makes its gap smaller, so it stays the fullest.

    Args:
        lengths: Length of each item, int64 [items], above 0 and at most `capacity`.
        capacity: Size of a bin.

    Returns:
        The bin of each item, int64 [items], numbered from 0.
    """
    bins = np.empty(len(lengths), np.int64)
    bins_by_gap: list[list[int]] = [[] for _ in range(capacity + 1)]
    gaps = 0  # bit g is set if there is a bin with exactly g left
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
