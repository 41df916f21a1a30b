"""Writing prepared data: shards of a split, and a directory that appears whole or not at all."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from olmoe_train.data.tokens import ENDS_DTYPE, Shard, Split
from olmoe_train.errors import UserError


class SplitWriter:
    """Documents in; shards `root/split/shard-00000.npy` and their document indexes out.

    A document is never cut: a shard is closed before the document that would take it past `shard_tokens`, and
    a longer document has a shard of its own. Memory: the document ends of one shard.
    """

    def __init__(self, root: Path, split: str, shard_tokens: int):
        self._root = root
        self._split = split
        self._shard_tokens = shard_tokens
        self._closed: list[Shard] = []
        self._open: _OpenShard | None = None
        self._text_bytes = 0
        (root / split).mkdir()

    def add(self, tokens: np.ndarray, lengths: list[int], text_bytes: int) -> None:
        """Append documents: `tokens` (of the shards' dtype) is their concatenation, each ended by its eos."""
        self._text_bytes += text_bytes
        for document in np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else ():
            if self._open is None or self._open.tokens + len(document) > self._shard_tokens:
                self._close_shard()
                self._open = _OpenShard(self._root, f"{self._split}/shard-{len(self._closed):05d}")
            self._open.add(document)

    def finish(self) -> Split:
        """Close the last shard and describe what was written."""
        self._close_shard()
        documents = sum(shard.documents for shard in self._closed)
        tokens = sum(shard.tokens for shard in self._closed)
        return Split(documents, tokens, self._text_bytes, tuple(self._closed))

    def _close_shard(self) -> None:
        if self._open is not None:
            self._closed.append(self._open.close())
            self._open = None


class _OpenShard:
    def __init__(self, root: Path, stem: str):
        self._root = root
        self._stem = stem
        self._file = (root / f"{stem}.npy").open("wb")
        self._hash = hashlib.sha256()
        self._ends: list[int] = []
        self.tokens = 0

    def add(self, document: np.ndarray) -> None:
        raw = document.tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        self.tokens += len(document)
        self._ends.append(self.tokens)

    def close(self) -> Shard:
        self._file.close()
        ends = np.array(self._ends, ENDS_DTYPE).tobytes()
        # Not .npy: whoever trains on `*.npy` must not read it as tokens.
        ends_path = f"{self._stem}.ends.u64"
        (self._root / ends_path).write_bytes(ends)
        return Shard(
            path=f"{self._stem}.npy",
            tokens=self.tokens,
            sha256=self._hash.hexdigest(),
            ends_path=ends_path,
            documents=len(self._ends),
            ends_sha256=hashlib.sha256(ends).hexdigest(),
        )


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A directory to write into, beside `final`; it is renamed to `final` when the block ends well.

    It is synced first: after a crash or a power cut, `final` is complete or not there. What an interrupted
    run left, the next one clears. UserError where `final` is taken, or two runs want it at once.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(
            f"data.dir={final}: exists and is not prepared data.\n  Choose a directory that is new or empty."
        )
    if final.is_mount():
        raise UserError(
            f"data.dir={final}: is a mount point, which cannot be renamed into; choose {final / 'data'}."
        )
    partial = final.with_name(f".{final.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = partial / "lock"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"data.dir={final}: another `olmoe prepare` is writing it; wait for it."
            ) from None
        try:
            _clear(partial, keep=lock)
            yield partial
            lock.unlink()
            _sync_tree(partial)
            partial.rename(final)
            _sync(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _clear(directory: Path, keep: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
