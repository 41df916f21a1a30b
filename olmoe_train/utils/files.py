"""File operations that survive a crash: atomic directories, atomic text files, locks; and JSON files.

All of them rest on the same sequence: write under a temporary name, fsync, rename, fsync the parent
directory. After a crash or a power cut the final name is either absent (or old) or complete, never in
between.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from olmoe_train.utils.errors import UserError


def fsync_path(path: Path) -> None:
    """Force a file's contents, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_directory(partial: Path, final: Path) -> None:
    """Rename a directory, whose files are on disk already, to its final name, and make the new name durable.

    Args:
        partial: The directory that was written. It must be on the file system of `final`.
        final: The name under which it appears. It must not exist, or be an empty directory.
    """
    fsync_path(partial)
    partial.rename(final)
    fsync_path(final.parent)


def write_out(out: Path, text: str) -> None:
    """Write the file that a user names with `out=`, complete or not at all, and its directory if missing.

    Raises:
        UserError: It cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out, text)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror}") from None


@contextmanager
def atomic_directory(final: Path, last: str | None = None) -> Iterator[Path]:
    """Write a directory that appears under its final name complete or not at all.

    The block writes files, no subdirectories. All of them get the permissions that the process's umask gives
    to new files, because safetensors makes its files readable by their owner only. Temporary directories
    that a killed process left for the same `final` are deleted first.

    Args:
        final: The directory to publish. Its parents are created.
        last: The file that makes the directory valid, for example config.json. It is needed if `final` may
            exist already: then the new files replace those in it one by one, and this one is replaced last.

    Yields:
        A temporary directory beside `final` to write into. It is published when the block ends without an
        exception, and deleted otherwise.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for left_over in final.parent.glob(f".{final.name}.*.partial"):
        shutil.rmtree(left_over)
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666
        for path in partial.iterdir():
            path.chmod(mode)
            fsync_path(path)
        if final.exists() and last is not None:
            _replace_files(partial, final, last)
        else:
            publish_directory(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace_files(partial: Path, final: Path, last: str) -> None:
    for name in sorted((path.name for path in partial.iterdir()), key=lambda name: name == last):
        (partial / name).replace(final / name)
    fsync_path(final)
    fsync_path(final.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file that readers see with its old or its new contents, also after a crash.

    Several threads, processes and hosts may write the same path: each uses its own temporary name, and the
    last rename wins. A process that is killed while it writes leaves `.NAME.*.tmp` beside `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock (flock) on a file while the block runs.

    The kernel releases the lock when the process ends, however it ends, so no stale lock can stay behind.
    The file is created if it is missing, and is not deleted.

    Args:
        path: The lock file.
        wait: Whether to wait for a lock that another process, or another block of this one, holds.

    Raises:
        BlockingIOError: The lock is held, and `wait` is false.
        OSError: The file cannot be opened, or its file system has no locks.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON with sorted keys, for a file of an `atomic_directory` (no fsync)."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: The file is not valid JSON, or holds something other than an object.
        OSError: The file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found a JSON {type(values).__name__}")
    return values
