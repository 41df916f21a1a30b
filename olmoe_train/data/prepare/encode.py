"""Encodes batches as token ids in worker processes, and returns the results in the order of the corpus."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from olmoe_train.config.choices import Records
from olmoe_train.data.chat_template import Span, TemplateError
from olmoe_train.data.manifest import DTYPES
from olmoe_train.data.prepare.batches import Batch, Work
from olmoe_train.data.prepare.compare import EncodedSide, compare_sides, encode_side
from olmoe_train.data.prepare.loss_mask import align_spans, mark_targets
from olmoe_train.data.prepare.record_spec import PREFERENCES, Filtered, RecordSpec
from olmoe_train.data.prepare.records import BadRecord, Document, ValidationSplit, documents
from olmoe_train.data.tokenizer import load_for_encoding


@dataclass(frozen=True)
class EncodedSplit:
    """The documents of a batch that belong to one split."""

    tokens: np.ndarray
    """All documents in a row, each with its eos, in the dtype of the shards."""
    targets: np.ndarray | None
    """Loss mask, uint8 per token: 1 if the token is a target, else 0. None: every token is a target."""
    lengths: list[int]
    """Tokens of each document, eos included."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    unaligned: int
    """Documents in which the target text could not be located among the tokens. They have no targets."""
    without_target: int
    """Documents without any target token, the unaligned ones included."""
    further: int
    """Documents that are not the first one of their record (data.source.turns=expand)."""
    turns: Counter[str]
    """TURN_COUNTS of the documents."""
    hashes: tuple[int, int] | None
    """Least and greatest split_hash of the documents. None: no document has one."""
    preferences: Counter[str] = field(default_factory=Counter)
    """PREFERENCE_COUNTS of the records."""
    longest: int = 0
    """Tokens of the longest document of preferences."""
    labels: np.ndarray | None = None
    """uint8 per document, of preferences."""
    origins: list[tuple[str, int]] = field(default_factory=list)
    """(path, line) of each document. Pickle stores a path once per batch."""


@dataclass(frozen=True)
class Encoded:
    """Result of encoding a batch."""

    train: EncodedSplit
    validation: EncodedSplit
    empty: int
    """Records without any text. They become no documents."""
    filtered: int
    """Records that a filter leaves out."""
    bad: list[BadRecord]


@dataclass(frozen=True)
class Encoder:
    """Encodes batches in a worker: `encoder(work)`. It must be small: it is sent along with every batch."""

    spec: RecordSpec
    validation: ValidationSplit
    tokenizer_json: Path
    eos_token_id: int
    vocab_size: int
    dtype: str
    strict: bool
    """Whether a bad record is an error. Otherwise it is returned."""

    def __call__(self, work: Work) -> Encoded:
        """Encode a batch. If strict, raises UserError (path:line) for the first bad record."""
        train: list[Document] = []
        validation: list[Document] = []
        bad: list[BadRecord] = []
        empty = filtered = 0
        for record in documents(work, self.spec, self.validation):
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
        if self.spec.records in PREFERENCES:
            return self._encode_preferences(batch, bad)
        dtype = DTYPES[self.dtype]
        arrays, masks = [np.empty(0, dtype)], [np.empty(0, np.uint8)]
        text_bytes = unaligned = without_target = further = 0
        turns: Counter[str] = Counter()
        hashes: list[int] = []
        origins: list[tuple[str, int]] = []
        for document, ids in zip(batch, self._ids([document.text for document in batch]), strict=True):
            if isinstance(ids, str):
                self._report(BadRecord(document.where, ids, document.text.encode()), bad)
                continue
            text_bytes += len(document.text.encode())
            origins.append((document.path, document.line))
            further += document.further
            turns.update(document.counts)
            hashes += [] if document.split_hash is None else [document.split_hash]
            if self._all_targets:
                arrays.append(np.array([*ids, self.eos_token_id], dtype))
                continue
            spans = self._target_spans(document, ids)
            # A chat template writes the end of a message itself. A completion has to learn to end.
            eos_is_target = self.spec.records is Records.prompt_completion
            ids, targets = mark_targets(ids, spans, self.eos_token_id, eos_is_target)
            arrays.append(np.array(ids, dtype))
            masks.append(targets)
            unaligned += spans is None
            turns["gain_by_expanding"] += spans is None and self._gains_by_expanding(document)
            without_target += not targets.any()
        mask = None if self._all_targets else np.concatenate(masks)
        lengths = [len(array) for array in arrays[1:]]
        return EncodedSplit(
            np.concatenate(arrays),
            mask,
            lengths,
            text_bytes,
            unaligned,
            without_target,
            further,
            turns,
            (min(hashes), max(hashes)) if hashes else None,
            origins=origins,
        )

    def _report(self, record: BadRecord, bad: list[BadRecord]) -> None:
        if self.strict:
            raise record.error()
        bad.append(record)

    def _encode_preferences(self, batch: list[Document], bad: list[BadRecord]) -> EncodedSplit:
        """Encode records of one or two documents each; a record is kept or left out as a whole."""
        size = 2 if self.spec.records is Records.preference else 1
        encoded = self._ids([document.text for document in batch])
        counts: Counter[str] = Counter()
        kept: list[Document] = []
        sides: list[EncodedSide] = []
        for first in range(0, len(batch), size):
            record = batch[first : first + size]
            found: list[EncodedSide | None] = []
            for document, ids in zip(record, encoded[first : first + size], strict=True):
                if isinstance(ids, str):
                    self._report(BadRecord(document.where, ids, document.text.encode()), bad)
                    break
                found.append(encode_side(document, ids, self.eos_token_id, self._encode_text))
            if len(found) < len(record):
                continue
            compared, reason = compare_sides(found, self.spec.truncate, self.spec.sequence_length)
            counts.update([reason] if reason else [])
            sides += compared
            kept += record[: len(compared)]
        counts["desirable"] = sum(document.label == 1 for document in kept)
        hashes = [document.split_hash for document in kept if document.split_hash is not None]
        dtype = DTYPES[self.dtype]
        return EncodedSplit(
            np.concatenate([np.empty(0, dtype), *(np.array(side.ids, dtype) for side in sides)]),
            np.concatenate([np.empty(0, np.uint8), *(side.targets for side in sides)]),
            [len(side.ids) for side in sides],
            text_bytes=sum(len(document.text.encode()) for document in kept),
            unaligned=0,
            without_target=0,
            further=sum(document.further for document in kept),
            turns=Counter(),
            hashes=(min(hashes), max(hashes)) if hashes else None,
            preferences=counts,
            longest=max((len(side.ids) for side in sides), default=0),
            labels=np.array([document.label for document in kept], np.uint8),
            origins=[(document.path, document.line) for document in kept],
        )

    @property
    def _all_targets(self) -> bool:
        return self.spec.records is Records.text

    def _target_spans(self, document: Document, ids: list[int]) -> list[Span] | None:
        """Return the document's target spans in tokens. None if they cannot be located."""
        if document.target_spans is None:
            return None
        return align_spans(document.text, document.target_spans, ids, self._encode_text)

    def _encode_text(self, text: str) -> list[int]:
        tokenizer = _tokenizer(self.tokenizer_json, self._all_targets)
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _gains_by_expanding(self, document: Document) -> bool:
        """Return whether data.source.turns=expand would find targets in a conversation without any."""
        if document.turns is None or self.spec.template is None:
            return False
        try:
            expanded = self.spec.template.expand(*document.turns)
        except TemplateError:
            return False
        for one in expanded:
            if one.spans and align_spans(one.text, one.spans, self._encode_text(one.text), self._encode_text):
                return True
        return False

    def _ids(self, texts: list[str]) -> list[list[int] | str]:
        """Return the token ids of each text, or the reason why it cannot be encoded."""
        tokenizer = _tokenizer(self.tokenizer_json, self._all_targets)
        try:
            found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # `tokenizers` raises bare Exception for a word without a token
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
    """Return the number of cores that this process may use. If the system cannot say, all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_processes(count: int) -> Iterator[Executor]:
    """Start `count` worker processes, and end them with the block."""
    # Not fork: training the tokenizer started threads in this process. A forked process would have their
    # locks, possibly held, but not the threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["olmoe_train.data.prepare.pipeline"])
    with ProcessPoolExecutor(count, context, initializer=_start_worker) as pool:
        yield pool


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    # Ctrl-C reaches the whole process group. The parent handles it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent is killed (kill -9, out of memory). It would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def in_order(
    pool: Executor, encode: Callable[[Work], Encoded], batches: Iterator[Batch], ahead: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Like pool.map, but with at most `ahead` batches encoded or waiting, so that memory stays bounded."""
    futures: deque[tuple[Batch, Future[Encoded]]] = deque()
    for batch in batches:
        futures.append((batch, pool.submit(encode, batch.work)))
        if len(futures) >= ahead:
            batch, future = futures.popleft()
            yield batch, future.result()
    while futures:
        batch, future = futures.popleft()
        yield batch, future.result()
