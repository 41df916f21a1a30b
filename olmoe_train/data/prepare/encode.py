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

from olmoe_train.config.choices import Records
from olmoe_train.data.chat_template import Span
from olmoe_train.data.prepare.batches import Batch, Work
from olmoe_train.data.prepare.loss_mask import align, mark_targets
from olmoe_train.data.prepare.record_spec import Filtered, Reading
from olmoe_train.data.prepare.records import BadRecord, Document, Splitting, documents
from olmoe_train.data.tokenizer import load_for_encoding
from olmoe_train.data.tokens import DTYPES


@dataclass(frozen=True)
class EncodedSplit:
    tokens: np.ndarray
    """Its documents, each ended by eos, of the shards' dtype."""
    targets: np.ndarray | None
    """uint8 a token: 1 where it is to be predicted, 0 where it is only read; None: all are predicted."""
    lengths: list[int]
    """Tokens of each document, eos included."""
    text_bytes: int
    unaligned: int
    """Documents whose turns cannot be told among the tokens; none of these is a target."""
    without_target: int
    """Documents without any target, the unaligned ones among them."""


@dataclass(frozen=True)
class Encoded:
    """What a worker makes of a batch."""

    train: EncodedSplit
    validation: EncodedSplit
    empty: int
    """Records without any text; they make no document."""
    filtered: int
    """Records that a filter leaves out."""
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
        empty = filtered = 0
        for record in documents(work, self.reading, self.splitting):
            if isinstance(record, BadRecord):
                if self.strict:
                    raise record.error()
                bad.append(record)
            elif isinstance(record, Filtered):
                filtered += 1
            elif not record.text.strip():
                empty += 1
            else:
                (validation if record.validation else train).append(record)
        return Encoded(self._encode(train, bad), self._encode(validation, bad), empty, filtered, bad)

    def _encode(self, batch: list[Document], bad: list[BadRecord]) -> EncodedSplit:
        dtype = DTYPES[self.dtype]
        arrays, masks = [np.empty(0, dtype)], [np.empty(0, np.uint8)]
        text_bytes = unaligned = without_target = 0
        for document, ids in zip(batch, self._ids([document.text for document in batch]), strict=True):
            if isinstance(ids, str):
                record = BadRecord(document.where, ids, document.text.encode())
                if self.strict:
                    raise record.error()
                bad.append(record)
                continue
            text_bytes += len(document.text.encode())
            if self._learns_all:
                arrays.append(np.array([*ids, self.eos_token_id], dtype))
                continue
            turns = self._turns(document, ids)
            # Where a turn of a conversation ends is for its template to say; a completion just ends.
            learn_eos = self.reading.records is Records.prompt_completion
            ids, targets = mark_targets(ids, turns, self.eos_token_id, learn_eos)
            arrays.append(np.array(ids, dtype))
            masks.append(targets)
            unaligned += turns is None
            without_target += not targets.any()
        mask = None if self._learns_all else np.concatenate(masks)
        lengths = [len(array) for array in arrays[1:]]
        return EncodedSplit(np.concatenate(arrays), mask, lengths, text_bytes, unaligned, without_target)

    @property
    def _learns_all(self) -> bool:
        return self.reading.records is Records.text

    def _turns(self, document: Document, ids: list[int]) -> list[Span] | None:
        """The document's turns in tokens; None: they cannot be told."""
        if document.turns is None:
            return None
        tokenizer = _tokenizer(self.tokenizer_json, self._learns_all)

        def encode(text: str) -> list[int]:
            return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

        return align(document.text, document.turns, ids, encode)

    def _ids(self, texts: list[str]) -> list[list[int] | str]:
        """Token ids of each text, or the reason why it has none."""
        tokenizer = _tokenizer(self.tokenizer_json, self._learns_all)
        try:
            found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # bare, from `tokenizers`: an unknown word without a token for it
            if len(texts) == 1:
                return [f"the tokenizer cannot encode it: {error}"]
            return [ids for text in texts for ids in self._ids([text])]
        return [self._within_vocabulary(encoding.ids) for encoding in found]

    def _within_vocabulary(self, ids: list[int]) -> list[int] | str:
        if ids and (largest := max(ids)) >= self.vocab_size:
            return f"the tokenizer made token id {largest} of it, beyond its vocabulary of {self.vocab_size}"
        return ids


@cache
def _tokenizer(tokenizer_json: Path, plain_text: bool) -> Tokenizer:
    return load_for_encoding(tokenizer_json, plain_text)


def cores() -> int:
    """Cores this process may use; where the system cannot say, cores there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    # Not fork: training the tokenizer has started threads here; a forked process would have their locks
    # without them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["olmoe_train.data.prepare.pipeline"])
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
