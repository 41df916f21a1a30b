"""Prepared tokens: reading a split through memory maps, or of an object store through blocks.

docs/reference/data-format.md describes the format.

A token shard is a raw little-endian array without a header, like the `.npy` files that dolma writes and OLMo
trains on (arXiv 2402.00159); `np.memmap(path, dtype)` opens it. Only data/prepare/ writes these files.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.data.manifest import (
    DTYPES,
    ENDS_DTYPE,
    LABELS_DTYPE,
    MANIFEST,
    MASK_DTYPE,
    ORIGINS_DTYPE,
    Manifest,
    Shard,
    damaged,
    read_manifest,
    shard_files,
)
from olmoe_train.data.remote import RemoteArray, RemoteFiles, count_up_to, remote_files
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import join
from olmoe_train.utils.redaction import redact_text


class TokenSplit:
    """The tokens of one split as a single array of length `len(self)`, over all its shards.

    Opening a split checks the sizes of its files. Token ids are checked when they are read. `verify_hashes`
    checks the contents.
    """

    def __init__(self, directory: Path, manifest: Manifest, name: str):
        self.directory = directory
        self.manifest = manifest
        self.name = name
        self.shards: tuple[Shard, ...] = getattr(manifest, name).shards
        self.dtype = DTYPES[manifest.dtype]
        self.remote = remote_files(directory)
        """Where the files are, if they are in an object store."""
        if self.remote is not None and manifest.tokens_in_place:
            raise UserError(
                f"{redact_text(self.remote.url)}: data.format=olmo names token files by their paths on one "
                "machine, so it cannot be read from a store"
            )
        self._remote_sizes = self.remote.sizes(name) if self.remote is not None and self.shards else {}
        self._hashes = {path: sha256 for shard in self.shards for path, sha256 in shard_files(shard)}
        for shard in self.shards:
            self._check_size(shard.path, shard.tokens * self.dtype.itemsize)
            self._check_size(shard.ends_path, shard.documents * ENDS_DTYPE.itemsize)
            if shard.mask_path is not None:
                self._check_size(shard.mask_path, shard.tokens * MASK_DTYPE.itemsize)
            if shard.labels_path is not None:
                self._check_size(shard.labels_path, shard.documents * LABELS_DTYPE.itemsize)
            if shard.origins_path is not None:
                self._check_size(shard.origins_path, shard.documents * ORIGINS_DTYPE.itemsize)
        self.has_mask = any(shard.mask_path is not None for shard in self.shards)
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self._first_documents = np.cumsum([0, *(shard.documents for shard in self.shards)])
        self._maps: dict[str, np.ndarray | RemoteArray] = {}

    def _check_size(self, relative: str, expected: int) -> None:
        path = self.path_of(relative)
        size = self._size_of(relative)
        if size is None:
            raise damaged(path, "missing", self.directory)
        if size != expected:
            raise damaged(path, f"{size:,} bytes, but {MANIFEST} says {expected:,}", self.directory)

    def _size_of(self, relative: str) -> int | None:
        if self.remote is not None:
            return self._remote_sizes.get(relative)
        path = self.directory / relative
        return path.stat().st_size if path.is_file() else None

    def path_of(self, relative: str) -> Path | str:
        """The path or URL of a file, for messages."""
        return self.directory / relative if self.remote is None else join(self.remote.url, relative)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens [start, stop) as int64. UserError for a token id outside the vocabulary."""
        out = np.empty(stop - start, np.int64)
        for shard, at, first, last in self._parts(start, stop):
            part = self._map(self.shards[shard].path, self.dtype)[first:last]
            self._check_ids(part, shard, first)
            out[at : at + len(part)] = part
        return out

    def read_mask(self, start: int, stop: int) -> np.ndarray:
        """Read which of the tokens [start, stop) are targets, as bool. Without a loss mask, all are."""
        out = np.ones(stop - start, bool)
        for shard, at, first, last in self._parts(start, stop):
            path = self.shards[shard].mask_path
            if path is not None:
                out[at : at + last - first] = self._map(path, MASK_DTYPE)[first:last]
        return out

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self._first_documents[-1])

    def document(self, index: int) -> tuple[int, int]:
        """Return (start, stop) of a document, in tokens of the split."""
        assert 0 <= index < self.documents, f"document {index} of {self.documents}"
        shard = int(np.searchsorted(self._first_documents, index, side="right")) - 1
        ends = self._map(self.shards[shard].ends_path, ENDS_DTYPE)
        at, base = index - int(self._first_documents[shard]), int(self._starts[shard])
        return base + (int(ends[at - 1]) if at > 0 else 0), base + int(ends[at])

    def document_at(self, position: int) -> int:
        """Return the number of the document that the token at `position` belongs to."""
        ((shard, _, first, _),) = self._parts(position, position + 1)
        ends = self._map(self.shards[shard].ends_path, ENDS_DTYPE)
        (within,) = count_up_to(ends, np.array([first], ENDS_DTYPE))
        return int(self._first_documents[shard]) + int(within)

    def packed_origin(self, document: int) -> tuple[Shard, int, int | None]:
        """Return (shard of a document, its number there, its origin as stored; None: not recorded)."""
        assert 0 <= document < self.documents, f"document {document} of {self.documents}"
        shard = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        number, path = document - int(self._first_documents[shard]), self.shards[shard].origins_path
        packed = None if path is None else int(self._map(path, ORIGINS_DTYPE)[number])
        return self.shards[shard], number, packed

    def labels(self, first: int, last: int) -> np.ndarray:
        """Read the labels of documents [first, last), as uint8. Only of preferences."""
        found = [np.empty(0, LABELS_DTYPE)]
        for shard, begin in zip(self.shards, self._first_documents.tolist(), strict=False):
            low, high = max(0, first - begin), min(last - begin, shard.documents)
            if low < high:
                assert shard.labels_path is not None, "the manifest has preferences"
                found.append(self._map(shard.labels_path, LABELS_DTYPE)[low:high])
        return np.concatenate(found)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in (start, stop) where documents start, as int64, ascending."""
        found = []
        for shard, at, first, last in self._parts(start, stop):
            ends = self._map(self.shards[shard].ends_path, ENDS_DTYPE)
            low, high = count_up_to(ends, np.array([first, last], ENDS_DTYPE))
            found.append(ends[low:high].astype(np.int64) + (start + at - first))
        starts = np.concatenate([np.empty(0, np.int64), *found])
        return starts[starts < stop]

    def document_windows(self, documents: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (starts, stops), int64, of `documents` documents at a time; the last ones may be fewer."""
        stops = np.empty(0, np.int64)
        previous = 0
        for index, shard in enumerate(self.shards):
            ends = self._map(shard.ends_path, ENDS_DTYPE)
            if shard.documents == 0 or int(ends[-1]) != shard.tokens:
                problem = f"its last document does not end at the end of the shard ({shard.tokens:,} tokens)"
                raise damaged(self.directory / shard.ends_path, problem, self.directory)
            for first in range(0, shard.documents, documents):
                part = ends[first : first + documents].astype(np.int64) + self._starts[index]
                stops = np.concatenate([stops, part])
                while len(stops) >= documents:
                    window, stops = stops[:documents], stops[documents:]
                    yield np.concatenate([[previous], window[:-1]]), window
                    previous = int(window[-1])
        if len(stops):
            yield np.concatenate([[previous], stops[:-1]]), stops

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield the shards that hold tokens [start, stop) of the split.

        Each item is (shard number, offset of its tokens from `start`, first and last + 1 of the tokens,
        counted within the shard).
        """
        assert 0 <= start <= stop <= len(self), f"[{start}, {stop}) of {len(self)} tokens"
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < stop:
            base, end = int(self._starts[shard]), min(stop, int(self._starts[shard + 1]))
            if end > at:
                yield shard, at - start, at - base, end - base
            at, shard = end, shard + 1

    def _map(self, relative: str, dtype: np.dtype[Any]) -> np.ndarray | RemoteArray:
        if relative not in self._maps:
            self._maps[relative] = (
                np.memmap(self.directory / relative, dtype, mode="r")
                if self.remote is None
                else self.remote_array(self.remote, relative, dtype)
            )
        return self._maps[relative]

    def remote_array(self, remote: RemoteFiles, relative: str, dtype: np.dtype[Any]) -> RemoteArray:
        """A file of the split in an object store."""
        length = self._remote_sizes[relative] // dtype.itemsize
        return RemoteArray(remote, relative, self._hashes[relative], dtype, length)

    def _check_ids(self, part: np.ndarray, shard: int, offset: int) -> None:
        if part.size and int(part.max()) >= self.manifest.vocab_size:
            at = int(part.argmax())
            problem = (
                f"token {offset + at:,} is {part[at]}, beyond the vocabulary of {self.manifest.vocab_size:,}"
            )
            raise damaged(self.path_of(self.shards[shard].path), problem, self.directory)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy all of its contents. Loader workers open their own maps.
        return {**self.__dict__, "_maps": {}}


def open_split(directory: str | Path, name: str) -> TokenSplit:
    """Open the split "train" or "validation" of a prepared directory. UserError if missing or damaged."""
    directory = Path(directory).expanduser()
    return TokenSplit(directory, read_manifest(directory), name)


def _verify_remote(split: TokenSplit) -> int:
    """Compare the files of a split in an object store with the manifest, and return their number."""
    files = [file for shard in split.shards for file in shard_files(shard)]
    for relative, expected in files:
        assert split.remote is not None
        array, digest = split.remote_array(split.remote, relative, MASK_DTYPE), hashlib.sha256()
        for number in range(array.blocks):
            digest.update(array.block(number))
        if digest.hexdigest() != expected:
            problem = "its contents changed since it was prepared (hash)"
            raise damaged(split.path_of(relative), problem, split.directory)
    return len(files)


def verify_hashes(directory: str | Path) -> int:
    """Compare the SHA-256 of every file of both splits with the manifest.

    Returns:
        The number of files.

    Raises:
        UserError: A file is missing, or its contents changed. The message names the first one.
    """
    directory = Path(directory).expanduser()
    manifest = read_manifest(directory)
    splits = [TokenSplit(directory, manifest, name) for name in ("train", "validation")]
    if splits[0].remote is not None:
        return sum(_verify_remote(split) for split in splits)
    files = [file for split in splits for shard in split.shards for file in shard_files(shard)]
    if manifest.source_files is not None:
        files.append((manifest.source_files.path, manifest.source_files.sha256))
    for relative, expected in files:
        path = directory / relative
        if not path.is_file():
            raise damaged(path, "missing", directory)
        with path.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected:
                raise damaged(path, "its contents changed since it was prepared (hash)", directory)
    return len(files)
