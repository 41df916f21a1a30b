"""Writes the shards of a split, into a directory that appears complete or not at all."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.data.manifest import ENDS_DTYPE, ORIGINS_DTYPE, Shard, Split, shard_files
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import file_lock, fsync_path, publish_directory

EMPTY_SHA256 = hashlib.sha256().hexdigest()
LOCK = "lock"
_BLOCK = 1 << 24  # tokens or bytes that are read at a time: bounds memory


class ChangedError(Exception):
    """The files that an interrupted run left are not as it recorded them. The message says what differs."""


class SplitWriter:
    """Writes documents to shards `root/split/shard-00000.npy`, with their indexes, loss masks and labels.

    A document is never cut, and the two sides of a pair are in one shard. A shard is closed before documents
    that would take it past `shard_tokens`, and longer ones get their own shard. Memory is constant.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        shard_tokens: int,
        vocab_size: int,
        dtype: np.dtype[Any],
        masked: bool = False,
        progress: dict[str, Any] | None = None,
        labelled: bool = False,
        with_origins: bool = False,
    ):
        """Open a split for writing.

        Args:
            root: The directory of the prepared data.
            split: "train" or "validation".
            shard_tokens: Most tokens per shard, unless a single document is longer.
            vocab_size: Token ids are below it.
            dtype: Data type of the token files.
            masked: Whether shards have a loss mask.
            progress: What `save` returned. The files are cut back to that point and continued.
            labelled: Whether shards have labels.
            with_origins: Whether shards record the file and the line of each document.

        Raises:
            ChangedError: The files do not hold what they did at that point.
        """
        self._root = root
        self._split = split
        self._shard_tokens = shard_tokens
        self._dtype = dtype
        self._masked, self._labelled, self._with_origins = masked, labelled, with_origins
        self._closed: list[Shard] = []
        self._open: _OpenShard | None = None
        self._text_bytes = 0
        self.counts = np.zeros(vocab_size, np.int64)
        """Occurrences of each token id among the targets, int64 [vocab_size]."""
        (root / split).mkdir(exist_ok=True)
        if progress is not None:
            self._restore(progress)

    @property
    def shards_closed(self) -> int:
        """Number of finished shards."""
        return len(self._closed)

    def add(
        self,
        tokens: np.ndarray,
        lengths: list[int],
        text_bytes: int,
        targets: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        together: int = 1,
        origins: np.ndarray | None = None,
    ) -> None:
        """Append documents.

        Args:
            tokens: All documents in a row, each with its eos, in the dtype of the shards.
            lengths: Tokens of each document.
            text_bytes: UTF-8 bytes of the documents.
            targets: Loss mask, uint8 per token: 1 for a target. Given exactly if the shards are masked.
            labels: uint8 per document. Given exactly if the shards are labelled.
            together: Number of consecutive documents that are in one shard: 2 for pairs.
            origins: uint64 per document (data/origins.py). Given exactly if the shards have origins.
        """
        assert (targets is not None) == self._masked
        assert (labels is not None) == self._labelled
        assert (origins is not None) == self._with_origins
        self._text_bytes += text_bytes
        self._count(tokens, targets)
        start = 0
        for number, length in enumerate(lengths):
            whole = sum(lengths[number : number + together])
            is_first = number % together == 0
            if self._open is None or (is_first and self._open.tokens + whole > self._shard_tokens):
                self._close_shard()
                self._open = self._new_shard(None)
            document = slice(start, start + length)
            of_document = (
                None if targets is None else targets[document],
                None if labels is None else labels[number],
                None if origins is None else origins[number],
            )
            self._open.add(tokens[document], *of_document)
            start += length

    def save(self) -> dict[str, Any]:
        """Force everything that was added to the disk. Returns the state to continue from, as JSON values."""
        return {
            "text_bytes": self._text_bytes,
            "closed": [asdict(shard) for shard in self._closed],
            "open": asdict(self._open.save()) if self._open else None,
        }

    def finish(self) -> Split:
        """Close the last shard and return the description of the split."""
        self._close_shard()
        documents = sum(shard.documents for shard in self._closed)
        tokens = sum(shard.tokens for shard in self._closed)
        return Split(documents, tokens, self._text_bytes, tuple(self._closed))

    def _new_shard(self, saved: Shard | None) -> "_OpenShard":
        optional = self._masked, self._labelled, self._with_origins
        return _OpenShard(self._root, self._stem(), saved, self._dtype, *optional)

    def _stem(self) -> str:
        return f"{self._split}/shard-{len(self._closed):05d}"

    def _close_shard(self) -> None:
        if self._open is not None:
            self._closed.append(self._open.close())
            self._open = None

    def _restore(self, progress: dict[str, Any]) -> None:
        self._text_bytes = progress["text_bytes"]
        self._closed = [Shard(**shard) for shard in progress["closed"]]
        for shard in self._closed:
            for path, sha256 in shard_files(shard):
                _check_hash(self._root / path, sha256)
            self._count_shard(shard)
        if progress["open"] is not None:
            shard = Shard(**progress["open"])
            self._open = self._new_shard(shard)
            self._count_shard(shard)

    def _count(self, tokens: np.ndarray, targets: np.ndarray | None) -> None:
        if targets is not None:
            tokens = tokens[targets == 1]
        self.counts += np.bincount(tokens, minlength=len(self.counts))

    def _count_shard(self, shard: Shard) -> None:
        """Count the tokens of a shard on disk, in bounded memory."""
        tokens = (
            np.memmap(self._root / shard.path, self._dtype, mode="r") if shard.tokens else np.empty(0, int)
        )
        mask = np.memmap(self._root / shard.mask_path, np.uint8, mode="r") if shard.mask_path else None
        for start in range(0, shard.tokens, _BLOCK):
            block = slice(start, min(start + _BLOCK, shard.tokens))
            self._count(tokens[block], None if mask is None else mask[block])


def _check_hash(path: Path, expected: str) -> None:
    """Raise ChangedError if the file is missing or has another hash."""
    if not path.is_file():
        raise ChangedError(f"{path.name} is missing")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise ChangedError(f"{path.name} changed")


class _HashedFile:
    """A file that is only appended to, with the SHA-256 of its contents."""

    def __init__(self, path: Path, size: int = 0, sha256: str = EMPTY_SHA256):
        """Continue after the first `size` bytes. ChangedError if their hash is not `sha256`."""
        self._hash = hashlib.sha256()
        self._file = path.open("r+b" if size else "wb")
        left = size
        while left and (block := self._file.read(min(_BLOCK, left))):
            self._hash.update(block)
            left -= len(block)
        if left or self.sha256 != sha256:
            raise ChangedError(f"{path.name} changed")
        self._file.truncate()

    def append(self, raw: bytes) -> None:
        self._file.write(raw)
        self._hash.update(raw)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class _OpenShard:
    """The shard that documents are appended to: tokens, index, and perhaps loss mask, labels and origins."""

    def __init__(
        self,
        root: Path,
        stem: str,
        saved: Shard | None,
        dtype: np.dtype[Any],
        masked: bool,
        labelled: bool,
        with_origins: bool,
    ):
        self.path = f"{stem}.npy"
        # The suffix is not .npy, so that a program that trains on `*.npy` does not read the index as tokens.
        self._ends_path = f"{stem}.ends.u64"
        self._mask_path = f"{stem}.mask.u8" if masked else None
        self._labels_path = f"{stem}.labels.u8" if labelled else None
        # A shard that an older version of this program began has no origins, and gets none.
        with_origins = with_origins and (saved is None or saved.origins_path is not None)
        self._origins_path = f"{stem}.origins.u64" if with_origins else None
        self.tokens = saved.tokens if saved else 0
        self._documents = saved.documents if saved else 0
        self._mask: _HashedFile | None = None
        self._labels: _HashedFile | None = None
        self._origins: _HashedFile | None = None
        if saved:
            size, ends_size = saved.tokens * dtype.itemsize, saved.documents * ENDS_DTYPE.itemsize
            self._file = _HashedFile(root / self.path, size, saved.sha256)
            self._ends = _HashedFile(root / self._ends_path, ends_size, saved.ends_sha256)
            if self._mask_path and saved.mask_sha256:
                self._mask = _HashedFile(root / self._mask_path, saved.tokens, saved.mask_sha256)
            if self._labels_path and saved.labels_sha256:
                self._labels = _HashedFile(root / self._labels_path, saved.documents, saved.labels_sha256)
            if self._origins_path and saved.origins_sha256:
                size = saved.documents * ORIGINS_DTYPE.itemsize
                self._origins = _HashedFile(root / self._origins_path, size, saved.origins_sha256)
        else:
            self._file, self._ends = _HashedFile(root / self.path), _HashedFile(root / self._ends_path)
            if self._mask_path:
                self._mask = _HashedFile(root / self._mask_path)
            if self._labels_path:
                self._labels = _HashedFile(root / self._labels_path)
            if self._origins_path:
                self._origins = _HashedFile(root / self._origins_path)

    def add(
        self, document: np.ndarray, mask: np.ndarray | None, label: int | None, origin: np.uint64 | None
    ) -> None:
        self._file.append(document.tobytes())
        self.tokens += len(document)
        self._documents += 1
        self._ends.append(self.tokens.to_bytes(ENDS_DTYPE.itemsize, "little"))
        if self._mask is not None and mask is not None:
            self._mask.append(mask.tobytes())
        if self._labels is not None and label is not None:
            self._labels.append(bytes([label]))
        if self._origins is not None and origin is not None:
            self._origins.append(int(origin).to_bytes(ORIGINS_DTYPE.itemsize, "little"))

    def save(self) -> Shard:
        """Force the files to the disk, and describe them as they are now."""
        for file in self._files():
            file.sync()
        return Shard(
            path=self.path,
            tokens=self.tokens,
            sha256=self._file.sha256,
            ends_path=self._ends_path,
            documents=self._documents,
            ends_sha256=self._ends.sha256,
            mask_path=self._mask_path,
            mask_sha256=self._mask.sha256 if self._mask else None,
            labels_path=self._labels_path,
            labels_sha256=self._labels.sha256 if self._labels else None,
            origins_path=self._origins_path,
            origins_sha256=self._origins.sha256 if self._origins else None,
        )

    def close(self) -> Shard:
        shard = self.save()
        for file in self._files():
            file.close()
        return shard

    def _files(self) -> list[_HashedFile]:
        files = (self._file, self._ends, self._mask, self._labels, self._origins)
        return [file for file in files if file is not None]


@contextmanager
def resumable_directory(final: Path, keep: Callable[[Path], bool] = lambda partial: False) -> Iterator[Path]:
    """Write a directory that appears under its final name complete or not at all, over several attempts.

    The directory is written beside `final` under a fixed name, `.NAME.partial`, and holds what an interrupted
    attempt left there. All files are forced to the disk before it is renamed to `final`.

    Args:
        final: The directory to create. It must not exist, or be empty.
        keep: If the block raises, decides whether the partial directory is kept for the next attempt.

    Yields:
        The partial directory.

    Raises:
        UserError: `final` cannot be created, or another process is writing it.
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
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(partial / LOCK, wait=False))
        except BlockingIOError:
            raise UserError(
                f"data.dir={final}: another `olmoe prepare` is writing it; wait for it."
            ) from None
        try:
            yield partial
            (partial / LOCK).unlink()
            for path in partial.rglob("*"):
                fsync_path(path)
            publish_directory(partial, final)
        except BaseException:
            if not keep(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def clear(partial: Path) -> None:
    """Delete what an interrupted attempt left, except the lock."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
