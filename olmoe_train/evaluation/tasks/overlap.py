"""Contamination: which questions of a task have stretches of tokens that the training data has, too.

A question overlaps if n successive tokens of it (13 by default) also stand in the training split, in the same
order and without a gap. Compared are the question alone and the right choice after it. A choice that is only
a letter (format mc) is left out.

A BPE gives the first word of a text other tokens after a space than at the start of a document or a line. So
the first n-gram of a question is looked up in both spellings.

The data is read once, in blocks. The hash of each n-gram of a block is looked up in a table of bits, which
leaves few candidates. These are looked up in the sorted hashes of the questions, and compared token by token:
a collision of hashes costs time and changes no result.

Shapes: Q questions, W n-grams of one text, U different n-grams of all questions, N tokens of an n-gram.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tokenizers import Tokenizer

from olmoe_train.data.manifest import MANIFEST, TOKENIZER, read_manifest
from olmoe_train.data.tokenizer import load_for_encoding
from olmoe_train.data.tokens import TokenSplit
from olmoe_train.evaluation.tasks.task import Task, TaskFormat
from olmoe_train.utils.errors import UserError

NGRAM = 13
"""Tokens of an n-gram. GPT-3 (arXiv 2005.14165, appendix C) compared 8 to 13 words."""

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no token is shifted out of the hash
_CHUNK = 1 << 22  # n-grams between two reports of progress
_BLOCK = 1 << 16  # n-grams that are hashed at a time: their arrays fit into the cache of a core
_SMALLEST_FILTER, _LARGEST_FILTER = 16, 27  # log2 of the bits; 64 per n-gram if they fit in 16 MiB
_TEXTS = 1000  # texts that are tokenized at a time

Chunk = tuple[int, int]
"""N-grams of the training split to look at: positions of the first one, and past the last one."""


@dataclass(frozen=True)
class Overlap:
    """What a task shares with the training data."""

    ngrams_Q: NDArray[np.int64]
    """N-grams of each question, equal ones included. 0: the question is too short."""
    matched_Q: NDArray[np.int64]
    """Those of them that the training data has."""

    @property
    def touched(self) -> NDArray[np.bool_]:
        """Bool [Q]: whether the training data has at least one n-gram of the question."""
        return self.matched_Q > 0

    @property
    def too_short(self) -> int:
        """Number of questions without an n-gram. They are not touched, but not known to be clean."""
        return int((self.ngrams_Q == 0).sum())


def find_overlaps(
    tasks: list[Task],
    directory: str | Path,
    n: int = NGRAM,
    with_progress: Callable[[list[Chunk]], Iterable[Chunk]] = iter,
) -> dict[str, Overlap]:
    """Look up the n-grams of the questions in the training split of prepared data.

    The text is encoded with the data's tokenizer, as plain text. Tokens of the data that are no targets count
    like others. Memory does not depend on the size of the data: at most 100 MB, and about 400 bytes for each
    n-gram of the questions while they are sorted.

    Args:
        tasks: The tasks. Their names differ.
        directory: A prepared directory; of a mixture, one of its sources.
        n: Tokens of an n-gram.
        with_progress: Wraps the chunks of the data, of at most 4,194,304 tokens each.

    Returns:
        Name of the task -> what it shares with the data.

    Raises:
        UserError: The directory has no prepared data or no tokenizer, or is damaged.
    """
    assert n > 0
    split, tokenizer = open_training_split(Path(directory).expanduser())
    rows = [rows for task in tasks for rows in _ngrams(task, tokenizer, n)]
    all_rows = np.concatenate([np.empty((0, n), np.uint32), *rows])
    ngrams_UN, ids = np.unique(all_rows, axis=0, return_inverse=True)
    found_U = _find(ngrams_UN, split, with_progress)
    by_question = np.split(found_U[ids.reshape(-1)], np.cumsum([len(part) for part in rows])[:-1])
    results = iter(by_question)
    return {task.name: _overlap([next(results) for _ in task.questions]) for task in tasks}


def open_training_split(directory: Path) -> tuple[TokenSplit, Tokenizer]:
    """Open the training split and its tokenizer. UserError: as `find_overlaps`."""
    if not (directory / MANIFEST).is_file() and (sources := sorted(directory.glob(f"*/{MANIFEST}"))):
        names = ", ".join(path.parent.name for path in sources)
        raise UserError(
            f"check_overlap={directory}: no prepared data itself, but of each source in it ({names}).\n"
            f"  Give the directory of one source: check_overlap={sources[0].parent}"
        )
    if not (directory / MANIFEST).is_file():
        raise UserError(
            f"check_overlap={directory}: no prepared data there (no {MANIFEST}).\n"
            "  Give a data.dir that `olmoe prepare` wrote."
        )
    manifest = read_manifest(directory)
    if manifest.tokenizer_sha256 is None:
        raise UserError(
            f"check_overlap={directory}: the data has no tokenizer to encode the questions with.\n"
            "  Run `olmoe prepare data=olmo` again, with tokenizer.path and another data.dir."
        )
    tokenizer = load_for_encoding(directory / TOKENIZER / "tokenizer.json", plain_text=True)
    return TokenSplit(directory, manifest, "train"), tokenizer


def _ngrams(task: Task, tokenizer: Tokenizer, n: int) -> Iterator[NDArray[np.uint32]]:
    """Yield the n-grams of each question, [1 + W, N]; [0, N] if it has none.

    The first row is the first n-gram as it is spelled after a space.
    """
    texts = []
    for question in task.questions:
        answer = "" if task.format is TaskFormat.mc else question.choices[question.gold]
        text = (question.text + answer).strip()
        texts += [f" {text}", text]
    for first in range(0, len(texts), 2 * _TEXTS):
        encoded = tokenizer.encode_batch_fast(texts[first : first + 2 * _TEXTS], add_special_tokens=False)
        tokens = [np.array(one.ids, np.uint32) for one in encoded]
        for after_space, at_start in zip(tokens[::2], tokens[1::2], strict=True):
            if len(at_start) < n:
                yield np.empty((0, n), np.uint32)
                continue
            rows_WN = sliding_window_view(at_start, n)
            spaced = after_space[:n] if len(after_space) >= n else at_start[:n]
            yield np.concatenate([spaced[None], rows_WN])


def _overlap(found: list[NDArray[np.bool_]]) -> Overlap:
    """Count what was found of the rows of `_ngrams`, one array per question."""
    ngrams, matched = [], []
    for rows in found:
        ngrams.append(max(0, len(rows) - 1))
        matched.append(int(rows[2:].sum() + rows[:2].any()))
    return Overlap(np.array(ngrams, np.int64), np.array(matched, np.int64))


def _hashes(rows_WN: np.ndarray) -> NDArray[np.uint64]:
    """Hash each row: a polynomial of its tokens, modulo 2^64. Its high bits depend on every token."""
    hashes_W = rows_WN[:, 0].astype(np.uint64)
    for column in range(1, rows_WN.shape[1]):
        hashes_W *= np.uint64(_MULTIPLIER)
        hashes_W += rows_WN[:, column]
    return hashes_W


def _find(
    ngrams_UN: NDArray[np.uint32],
    split: TokenSplit,
    with_progress: Callable[[list[Chunk]], Iterable[Chunk]],
) -> NDArray[np.bool_]:
    """Return which of the n-grams the split has, bool [U]."""
    n = ngrams_UN.shape[1]
    order = np.argsort(_hashes(ngrams_UN))
    ngrams_UN = ngrams_UN[order]
    hashes_U = _hashes(ngrams_UN)
    bits = min(max(_SMALLEST_FILTER, (64 * len(order)).bit_length()), _LARGEST_FILTER)
    occurs = np.zeros(1 << bits - 3, np.uint8)
    byte_U, bit_U = _slots(hashes_U, bits)
    np.bitwise_or.at(occurs, byte_U, np.uint8(1) << bit_U)
    found_U = np.zeros(len(order), bool)
    for first, last in with_progress(_chunks(split, n)):
        for start in range(first, last, _BLOCK):
            tokens = split.read(start, min(start + _BLOCK, last) + n - 1).view(np.uint64)
            windows_WN = sliding_window_view(tokens, n)
            hashes_W = _hashes(windows_WN)
            byte_W, bit_W = _slots(hashes_W, bits)
            at = np.flatnonzero(occurs[byte_W] >> bit_W & 1)
            at = at[np.argsort(hashes_W[at])]  # in this order, looking up costs a third
            ranks = np.searchsorted(hashes_U, hashes_W[at])
            while len(at):
                inside = ranks < len(hashes_U)
                at, ranks = at[inside], ranks[inside]
                same = hashes_U[ranks] == hashes_W[at]
                at, ranks = at[same], ranks[same]
                equal = (ngrams_UN[ranks] == windows_WN[at]).all(1)
                found_U[ranks[equal]] = True
                at, ranks = at[~equal], ranks[~equal] + 1  # n-grams with the same hash are neighbors
    in_given_order = np.empty_like(found_U)
    in_given_order[order] = found_U
    return in_given_order


def _slots(hashes: NDArray[np.uint64], bits: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the byte and the bit of each hash in a table of 2^bits bits."""
    slots = (hashes >> np.uint64(64 - bits)).view(np.int64)
    return slots >> 3, (slots & 7).astype(np.uint8)


def _chunks(split: TokenSplit, n: int) -> list[Chunk]:
    """Divide the n-grams of a split. None of them crosses the end of a shard, as no document does."""
    chunks, start = [], 0
    for shard in split.shards:
        stop = start + shard.tokens - n + 1
        chunks += [(first, min(first + _CHUNK, stop)) for first in range(start, stop, _CHUNK)]
        start += shard.tokens
    return chunks
