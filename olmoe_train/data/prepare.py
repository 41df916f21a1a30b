"""A corpus to tokens on disk: list the files, train or read the tokenizer, encode in parallel, write shards.

The bytes written depend on the settings and the corpus alone, not on the number of processes: workers return
encoded files in the order of the file list, and this process alone writes. tokens.py reads what is written
here.
"""

import math
import multiprocessing
import os
import platform
import signal
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from olmoe_train.config import PrepareConfig
from olmoe_train.data.corpus import batches_of_files, python_stdlib_files, read_text, split_by_name
from olmoe_train.data.tokenizer import (
    SMALLEST_VOCABULARY,
    TokenizerFiles,
    load_for_encoding,
    read_tokenizer,
    train_tokenizer,
)
from olmoe_train.data.tokens import (
    DTYPES,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Split,
    read_manifest,
    verify_hashes,
    write_manifest,
)
from olmoe_train.data.writer import SplitWriter, new_directory
from olmoe_train.errors import UserError

# Text encoded a task: large against the cost of a task, small against a core's share of the corpus.
BATCH_BYTES = 256 * 1024
# Tasks a process under way or waiting to be written; bounds memory.
TASKS_AHEAD = 4


def prepare(cfg: PrepareConfig) -> Manifest:
    """Prepare cfg.data.dir, or verify it if it was prepared with the same settings. Returns its manifest.

    The directory appears whole or not at all. Raises UserError for bad settings, for a directory that holds
    anything else, and for bad input (path:line).
    """
    _check(cfg)
    final = Path(cfg.data.dir).expanduser().resolve()
    tokenizer = read_tokenizer(cfg.tokenizer.path) if cfg.tokenizer.path else None
    settings = _settings(cfg, tokenizer)
    if (final / MANIFEST).exists():
        manifest = read_manifest(final)
        _refuse_other_settings(final, manifest.settings, settings)
        print(f"already prepared, nothing to do: {final} ({verify_hashes(final)} files verified)")
    else:
        with new_directory(final) as directory:
            manifest = _write(directory, cfg, tokenizer, settings)
        print(f"prepared {final}")
    print(_summary(manifest))
    return manifest


def _check(cfg: PrepareConfig) -> None:
    """All bad values at once."""
    source, errors = cfg.data.source, []
    if not 0 <= source.validation_fraction < 1:
        errors.append(
            f"data.source.validation_fraction={source.validation_fraction}: must be at least 0 and below 1"
        )
    if source.shard_tokens < 1:
        errors.append(f"data.source.shard_tokens={source.shard_tokens}: must be at least 1")
    if source.processes < 0:
        errors.append(f"data.source.processes={source.processes}: must be at least 1, or 0 for one a core")
    if cfg.tokenizer.path is None and cfg.tokenizer.vocab_size < SMALLEST_VOCABULARY:
        errors.append(
            f"tokenizer.vocab_size={cfg.tokenizer.vocab_size}: must be at least {SMALLEST_VOCABULARY} "
            "(256 bytes and 2 special tokens)"
        )
    if errors:
        raise UserError("\n  ".join(errors))


def _settings(cfg: PrepareConfig, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """The keys that decide the shards' bytes, as the manifest keeps them."""
    source = cfg.data.source
    return {
        "seed": cfg.seed,
        "data.source.kind": source.kind.value,
        "data.source.validation_fraction": source.validation_fraction,
        "data.source.shard_tokens": source.shard_tokens,
        # By contents, for a path says little; a given tokenizer brings its own vocabulary size.
        "tokenizer.path": f"sha256:{tokenizer.sha256}" if tokenizer else None,
        "tokenizer.vocab_size": None if tokenizer else cfg.tokenizer.vocab_size,
    }


def _refuse_other_settings(directory: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
    if differing:
        lines = [
            f"{key}: {_yaml(there.get(key))} there, {_yaml(asked.get(key))} asked for" for key in differing
        ]
        raise UserError(
            "\n    ".join([f"data.dir={directory} was prepared with other settings:", *lines])
            + f"\n  Choose another data.dir, or delete {directory} to prepare it anew."
        )


def _yaml(value: object) -> str:
    return "null" if value is None else str(value)


def _write(
    directory: Path, cfg: PrepareConfig, tokenizer: TokenizerFiles | None, settings: dict[str, Any]
) -> Manifest:
    """All of preparing: fills `directory`, the manifest last."""
    source = cfg.data.source
    root = Path(sysconfig.get_paths()["stdlib"])
    train, validation = split_by_name(python_stdlib_files(root), root, source.validation_fraction, cfg.seed)
    with _progress_bar() as progress:
        if tokenizer is None:
            tokenizer = train_tokenizer(_texts(train, progress), cfg.tokenizer.vocab_size)
        tokenizer.save(directory / TOKENIZER)
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        encode = partial(
            encode_files,
            tokenizer_json=directory / TOKENIZER / "tokenizer.json",
            eos_token_id=tokenizer.eos_token_id,
            dtype=dtype,
        )
        processes = source.processes or _cores()
        with _worker_processes(processes) as pool:
            written = {}
            for name, files in (("train", train), ("validation", validation)):
                batches = batches_of_files(files, BATCH_BYTES)
                encoded = _in_order(pool, encode, batches, ahead=TASKS_AHEAD * processes)
                shards = SplitWriter(directory, name, source.shard_tokens)
                task = progress.add_task(f"encoding {name}", total=_size(files), rate="")
                written[name] = _write_split(encoded, shards, tokenizer.vocab_size, progress, task)
    splits = [written["train"].split, written["validation"].split]
    manifest = Manifest(
        settings=settings,
        source=f"the standard library of {platform.python_implementation()} {platform.python_version()}",
        skipped_empty_documents=sum(part.empty for part in written.values()),
        tokenizer_sha256=tokenizer.sha256,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bytes_per_token=sum(split.bytes for split in splits) / sum(split.tokens for split in splits),
        unigram_entropy=unigram_entropy(written["train"].counts, written["validation"].counts),
        train=splits[0],
        validation=splits[1],
    )
    write_manifest(directory, manifest)
    return manifest


@dataclass(frozen=True)
class Encoded:
    """What a worker makes of a batch of files."""

    tokens: np.ndarray
    """Its documents, each ended by eos, of the shards' dtype."""
    lengths: list[int]
    """Tokens of each document, eos included."""
    text_bytes: int
    empty: int
    """Files without any text; they make no document."""


def encode_files(files: list[Path], tokenizer_json: Path, eos_token_id: int, dtype: str) -> Encoded:
    """Runs in a worker. UserError path:line for bytes that are not UTF-8."""
    texts = [read_text(path) for path in files]
    documents = [text for text in texts if text.strip()]
    encodings = _tokenizer(tokenizer_json).encode_batch_fast(documents, add_special_tokens=False)
    arrays = [np.array([*encoding.ids, eos_token_id], DTYPES[dtype]) for encoding in encodings]
    return Encoded(
        tokens=np.concatenate(arrays) if arrays else np.empty(0, DTYPES[dtype]),
        lengths=[len(array) for array in arrays],
        text_bytes=sum(len(text.encode()) for text in documents),
        empty=len(texts) - len(documents),
    )


@cache
def _tokenizer(tokenizer_json: Path) -> Tokenizer:
    return load_for_encoding(tokenizer_json)


@dataclass(frozen=True)
class _WrittenSplit:
    split: Split
    counts: np.ndarray
    """Occurrences of each token id, int64 [V]."""
    empty: int


def _write_split(
    encoded: Iterator[Encoded], shards: SplitWriter, vocab_size: int, progress: Progress, task: TaskID
) -> _WrittenSplit:
    counts = np.zeros(vocab_size, np.int64)
    empty = 0
    for batch in encoded:
        shards.add(batch.tokens, batch.lengths, batch.text_bytes)
        counts += np.bincount(batch.tokens, minlength=vocab_size)
        empty += batch.empty
        elapsed = progress.tasks[task].elapsed or 0.0
        rate = f"{counts.sum() / elapsed:,.0f} tokens/s" if elapsed else ""
        progress.update(task, advance=batch.text_bytes, rate=rate)
    return _WrittenSplit(shards.finish(), counts, empty)


def unigram_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float | None:
    """Nats a token: cross-entropy of the validation tokens under the training frequencies, add-one smoothed.

    Both int64 [V], occurrences of each token id. None without validation tokens.
    """
    if not validation_counts.any():
        return None
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return float(-(validation_counts @ log_probabilities) / validation_counts.sum())


def _texts(files: list[Path], progress: Progress) -> Iterator[str]:
    task = progress.add_task("training the tokenizer", total=_size(files), rate="")
    for path in files:
        yield read_text(path)
        progress.advance(task, path.stat().st_size)


def _size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _progress_bar() -> Progress:
    """On stderr. On a terminal it moves; elsewhere each task leaves one line when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )


def _cores() -> int:
    """Cores this process may use; where the system cannot say, cores there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _worker_processes(count: int) -> Iterator[Executor]:
    # Not fork: training the tokenizer has started threads here; a forked process would have their locks
    # without them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
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


def _in_order(
    pool: Executor, function: Callable[[list[Path]], Encoded], batches: Iterator[list[Path]], ahead: int
) -> Iterator[Encoded]:
    """pool.map, but with at most `ahead` batches under way or waiting, so that memory stays bounded."""
    futures: deque[Future[Encoded]] = deque()
    for batch in batches:
        futures.append(pool.submit(function, batch))
        if len(futures) >= ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _summary(manifest: Manifest) -> str:
    rows = [f"  source      {manifest.source}"]
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        rows.append(
            f"  {name:<11} {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes, "
            f"{len(split.shards)} shard(s)"
        )
    if manifest.skipped_empty_documents:
        rows.append(f"  skipped     {manifest.skipped_empty_documents:,} empty documents")
    rows.append(f"  tokenizer   {manifest.vocab_size:,} tokens, {manifest.bytes_per_token:.2f} bytes a token")
    if (entropy := manifest.unigram_entropy) is not None:
        rows.append(
            f"  unigram     {entropy:.3f} nats a token (perplexity {math.exp(entropy):,.0f}): "
            "the validation loss of guessing by frequency alone"
        )
    return "\n".join(rows)
