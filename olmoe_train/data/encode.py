"""Batches to token ids, in worker processes that hand their results back in the order of the corpus."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from olmoe_train.data.reader import Batch, Reading, Work
from olmoe_train.data.records import BadRecord, Document, Splitting, documents
from olmoe_train.data.tokenizer import load_for_encoding
from olmoe_train.data.tokens import DTYPES


@dataclass(frozen=True)
class EncodedSplit:
    tokens: np.ndarray
    """Its documents, each ended by eos, of the shards' dtype."""
    lengths: list[int]
    """Tokens of each document, eos included."""
    text_bytes: int


@dataclass(frozen=True)
class Encoded:
    """What a worker makes of a batch."""

    train: EncodedSplit
    validation: EncodedSplit
    empty: int
    """Records without any text; they make no document."""
    bad: list[BadRecord]


@dataclass(frozen=True)
class Encoder:
    """Runs in a worker: `encoder(work)`; sent there with every batch, so small."""

    reading: Reading
    splitting: Splitting
    tokenizer_json: Path
    eos_token_id: int
    vocab_size: int
    dtype: str
    strict: bool

    def __call__(self, work: Work) -> Encoded:
        """UserError path:line for the first bad record, if strict."""
        train: list[Document] = []
        validation: list[Document] = []
        bad: list[BadRecord] = []
        empty = 0
        for record in documents(work, self.reading, self.splitting):
            if isinstance(record, BadRecord):
                if self.strict:
                    raise record.error()
                bad.append(record)
            elif not record.text.strip():
                empty += 1
            else:
                (validation if record.validation else train).append(record)
        return Encoded(self._encode(train, bad), self._encode(validation, bad), empty, bad)

    def _encode(self, batch: list[Document], bad: list[BadRecord]) -> EncodedSplit:
        arrays, text_bytes = [], 0
        for document, ids in zip(batch, self._ids(batch), strict=True):
            if isinstance(ids, str):
                record = BadRecord(document.where, ids, document.text.encode())
                if self.strict:
                    raise record.error()
                bad.append(record)
                continue
            arrays.append(np.array([*ids, self.eos_token_id], DTYPES[self.dtype]))
            text_bytes += len(document.text.encode())
        tokens = np.concatenate(arrays) if arrays else np.empty(0, DTYPES[self.dtype])
        return EncodedSplit(tokens, [len(array) for array in arrays], text_bytes)

    def _ids(self, batch: list[Document]) -> list[list[int] | str]:
        """Token ids of each document, or the reason why it has none."""
        tokenizer = _tokenizer(self.tokenizer_json)
        try:
            found = tokenizer.encode_batch_fast(
                [document.text for document in batch], add_special_tokens=False
            )
        except Exception as error:  # bare, from `tokenizers`: an unknown word without a token for it
            if len(batch) == 1:
                return [f"the tokenizer cannot encode it: {error}"]
            return [ids for document in batch for ids in self._ids([document])]
        return [self._within_vocabulary(encoding.ids) for encoding in found]

    def _within_vocabulary(self, ids: list[int]) -> list[int] | str:
        if ids and (largest := max(ids)) >= self.vocab_size:
            return f"the tokenizer made token id {largest} of it, beyond its vocabulary of {self.vocab_size}"
        return ids


@cache
def _tokenizer(tokenizer_json: Path) -> Tokenizer:
    return load_for_encoding(tokenizer_json)


def cores() -> int:
    """Cores this process may use; where the system cannot say, cores there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    # Not fork: training the tokenizer has started threads here; a forked process would have their locks
    # without them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["olmoe_train.data.prepare"])
    with ProcessPoolExecutor(count, context, initializer=_start_worker) as pool:
        yield pool


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A killed parent (kill -9, out of memory) would leave its workers waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def in_order(
    pool: Executor, encode: Callable[[Work], Encoded], batches: Iterator[Batch], ahead: int
) -> Iterator[tuple[Batch, Encoded]]:
    """pool.map, but with at most `ahead` batches under way or waiting, so that memory stays bounded."""
    futures: deque[tuple[Batch, Future[Encoded]]] = deque()
    for batch in batches:
        futures.append((batch, pool.submit(encode, batch.work)))
        if len(futures) >= ahead:
            batch, future = futures.popleft()
            yield batch, future.result()
    while futures:
        batch, future = futures.popleft()
        yield batch, future.result()
