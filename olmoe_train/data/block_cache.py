"""Blocks of objects in a store, kept in a directory of bounded size that processes and runs share.

A block is a file with the hash of its contents at its end, written under a temporary name and renamed. So
readers see whole blocks only, and one that the disk has damaged is fetched again. The name of a block follows
from the SHA-256 of its shard: the same shard under another URL is not fetched again, and a changed one never
mistaken.
"""

import errno
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import xxhash

log = logging.getLogger(__name__)
MEMORY_BYTES = 64 * 1024**2
"""Blocks that one process keeps in memory, beside the page cache."""
PROCESSES = 16
"""Processes that may write at the same time without the directory growing beyond its limit."""
_HASH_BYTES = 16
_HEADROOM = (
    8  # the directory is emptied to 7/8 of its limit; each process may add 1/128 before it looks again
)
_LEFT_OVER_S = 3600  # age of a temporary file whose process must be dead


class BlockCache:
    """The blocks in one directory. Every process makes its own; loader workers get one by pickling."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self.limit = directory, limit_bytes
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._in_memory = 0
        self._since_look: int | None = None
        """Bytes that this process wrote since it looked at the size of the directory. None: it never did."""
        self._is_full = False

    def get(self, name: str, fetch: Callable[[], bytes]) -> bytes:
        """Return a block: from memory, from the directory, or from `fetch`, in this order."""
        found = self._memory.get(name)
        if found is not None:
            self._memory.move_to_end(name)
            return found
        content = self._read(name)
        if content is None:
            content = fetch()
            self._write(name, content)
        self._memory[name] = content
        self._in_memory += len(content)
        while self._in_memory > MEMORY_BYTES and len(self._memory) > 1:
            self._in_memory -= len(self._memory.popitem(last=False)[1])
        return content

    def _path(self, name: str) -> Path:
        return self.directory / name[:2] / name

    def _read(self, name: str) -> bytes | None:
        """The block in the directory, marked as used now. None: there is none, or it is damaged."""
        path = self._path(name)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:  # or deleted by another process in between: then it is fetched again
            return None
        content, digest = stored[:-_HASH_BYTES], stored[-_HASH_BYTES:]
        if xxhash.xxh3_128_digest(content) == digest:
            return content
        log.warning("warning: %s is damaged: it is fetched again", path)
        return None

    def _write(self, name: str, content: bytes) -> None:
        """Keep a block. A full disk is reported once; reading goes on without the cache."""
        self._make_room(len(content))
        path = self._path(name)
        temporary = path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content + xxhash.xxh3_128_digest(content))
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._is_full:
                log.warning(
                    "WARNING: %s cannot grow (%s): blocks are read again", self.directory, error.strerror
                )
            self._is_full = True

    def _make_room(self, size: int) -> None:
        if self._since_look is not None:
            self._since_look += size
            if self._since_look <= self.limit // (_HEADROOM * PROCESSES):
                return
        self._since_look = size
        blocks, total = [], 0
        for path in self.directory.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == ".tmp":
                if time.time() - status.st_mtime > _LEFT_OVER_S:
                    path.unlink(missing_ok=True)
                continue
            blocks.append((status.st_mtime_ns, status.st_size, path))
            total += status.st_size
        wanted = self.limit - self.limit // _HEADROOM
        for _, length, path in sorted(blocks):
            if total + size <= wanted:
                break
            path.unlink(missing_ok=True)
            total -= length

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_memory": OrderedDict(), "_in_memory": 0}
