"""Prepared data in an object store: its small files in a directory of this machine, its shards by blocks.

`local_directory` makes the directory, which every reader of prepared data then takes for the prepared
directory: it has the manifest, the tokenizer, the list of source files, and remote.json, which says where the
shards are.
"""

import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

from olmoe_train.config.data import DataConfig
from olmoe_train.data.block_cache import BlockCache
from olmoe_train.data.manifest import MANIFEST, SOURCE_FILES, TOKENIZER
from olmoe_train.utils import object_store
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_write_text, file_lock
from olmoe_train.utils.object_store import is_remote, join
from olmoe_train.utils.redaction import redact_text

REMOTE = "remote.json"
_BLOCKS, _DIRECTORIES = "blocks", "prepared"


def resolve(root: str, directory: str) -> str:
    """The path or URL of `directory`, which may be relative to the path or URL `root`."""
    if is_remote(directory) or not is_remote(root):
        return (
            directory if is_remote(directory) else str(Path(root).expanduser() / Path(directory).expanduser())
        )
    return directory if Path(directory).expanduser().is_absolute() else join(root, *Path(directory).parts)


def last_name(path: str) -> str:
    """The last part of a path or URL."""
    if is_remote(path):
        return PurePosixPath(path.partition("://")[2]).name
    return Path(path).name or Path(path).resolve().name


def local_directory(data: DataConfig, path: str) -> Path:
    """The directory of this machine for a prepared directory, which may be a URL.

    Raises:
        UserError: There is no prepared data in the store, or it cannot be read.
    """
    if not is_remote(path):
        return Path(path).expanduser()
    error = object_store.url_error("data.dir", path) or object_store.missing_package("data.dir", path)
    if error is not None:
        raise UserError(error)
    if path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    root = object_store.cache_root(data.cache_dir)
    return _mirrored(path.rstrip("/"), root, int(data.cache_gb * 1e9), data.cache_block_kib * 1024)


@lru_cache
def _mirrored(url: str, cache: Path, limit_bytes: int, block_bytes: int) -> Path:
    """Bring the small files here: once in a process, and one process of the machine after the other."""
    try:
        directory = object_store.cached_directory(_DIRECTORIES, url, cache)
        (directory / TOKENIZER).mkdir(parents=True, exist_ok=True)
        with file_lock(directory / ".lock"):
            _copy_small_files(url, directory)
            values = {"url": url, "blocks": str(cache / _BLOCKS), "limit_bytes": limit_bytes}
            atomic_write_text(directory / REMOTE, json.dumps(values | {"block_bytes": block_bytes}) + "\n")
    except object_store.StoreError:
        raise
    except OSError as error:
        raise UserError(f"data.cache_dir={cache}: cannot be written: {error.strerror}") from None
    return directory


def _copy_small_files(url: str, directory: Path) -> None:
    shown = redact_text(url)
    there = object_store.list_files(url)
    if MANIFEST not in there:
        raise UserError(
            f"data.dir={shown}: no prepared data there (no {MANIFEST}).\n"
            f"  Run `olmoe prepare ... data.dir=DIR`, and copy DIR there, {MANIFEST} last"
        )
    manifest = object_store.read(join(url, MANIFEST), 0, there[MANIFEST])
    kept = directory / MANIFEST
    if kept.is_file() and kept.read_bytes() == manifest:
        return
    kept.unlink(missing_ok=True)
    for name, size in object_store.list_files(join(url, TOKENIZER)).items():
        (directory / TOKENIZER / name).write_bytes(object_store.read(join(url, TOKENIZER, name), 0, size))
    if SOURCE_FILES in there:
        content = object_store.read(join(url, SOURCE_FILES), 0, there[SOURCE_FILES])
        (directory / SOURCE_FILES).write_bytes(content)
    atomic_write_text(kept, manifest.decode())


@dataclass(frozen=True)
class RemoteFiles:
    """Where the shards of a prepared directory are."""

    url: str
    block_bytes: int
    cache: BlockCache

    def sizes(self, name: str) -> dict[str, int]:
        """The sizes of the files of a split, by their path in the prepared directory."""
        return {
            f"{name}/{file}": size for file, size in object_store.list_files(join(self.url, name)).items()
        }


def remote_files(directory: Path) -> RemoteFiles | None:
    """Where the shards of a prepared directory are. None: in the directory."""
    path = directory / REMOTE
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    cache = BlockCache(Path(values["blocks"]), values["limit_bytes"])
    return RemoteFiles(values["url"], values["block_bytes"], cache)


class RemoteArray:
    """A file of a store as an array, like np.memmap: items and slices without a step."""

    def __init__(
        self, files: RemoteFiles, relative: str, sha256: str, dtype: np.dtype[Any], length: int
    ) -> None:
        self.dtype, self._length = dtype, length
        self._files, self._url = files, join(files.url, relative)
        self._identity = f"{sha256}/{files.block_bytes}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            assert step == 1, index
            return self._read(start, max(start, stop))
        at = index + self._length if index < 0 else index
        assert 0 <= at < self._length, index
        return self._read(at, at + 1)[0]

    def _read(self, start: int, stop: int) -> np.ndarray:
        first, last = start * self.dtype.itemsize, stop * self.dtype.itemsize
        size, parts = self._files.block_bytes, []
        for number in range(first // size, -(-last // size) if last > first else 0):
            block = self.block(number)
            parts.append(block[max(0, first - number * size) : last - number * size])
        return np.frombuffer(b"".join(parts), self.dtype)

    @property
    def blocks(self) -> int:
        """Number of blocks of the file."""
        return -(-self._length * self.dtype.itemsize // self._files.block_bytes)

    def block(self, number: int) -> bytes:
        """The bytes of one block."""
        size, end = self._files.block_bytes, self._length * self.dtype.itemsize
        start, stop = number * size, min((number + 1) * size, end)
        name = xxhash.xxh3_128_hexdigest(f"{self._identity}/{number}".encode())
        return self._files.cache.get(name, lambda: object_store.read(self._url, start, stop))


def count_up_to(ends: "np.ndarray | RemoteArray", values: np.ndarray) -> np.ndarray:
    """For each of `values`, how many of the ascending `ends` are not greater.

    Args:
        ends: An index of documents. Of a remote one, only the blocks that a binary search meets are read.
        values: In the dtype of `ends`: with any other, searchsorted would convert the whole index.
    """
    if isinstance(ends, RemoteArray):
        return np.array([bisect_right(ends, value) for value in values])
    return np.searchsorted(ends, values, side="right")
