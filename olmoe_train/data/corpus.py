"""The documents: which files there are, which split each belongs to, and their text."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from olmoe_train.errors import UserError

# Tests, compiled files and other people's packages.
_NOT_SOURCE = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def python_stdlib_files(root: Path) -> list[Path]:
    """The Python files of the standard library at `root` (about 12 MB), in order of their names.

    Without what an interpreter's build generated (config-*/, _sysconfigdata*.py), which differs from machine
    to machine.
    """
    files: list[Path] = []
    for directory, children, names in os.walk(root):
        children[:] = [
            name for name in children if name not in _NOT_SOURCE and not name.startswith("config-")
        ]
        paths = (Path(directory) / name for name in names if name.endswith(".py"))
        files += [path for path in paths if path.is_file() and not path.name.startswith("_sysconfigdata")]
    if not files:
        raise UserError(
            f"data.source.kind=python_stdlib: {root} has no .py files; use a Python that ships its source"
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def split_by_name(files: list[Path], root: Path, fraction: float, seed: int) -> tuple[list[Path], list[Path]]:
    """(training, validation) files, each in the given order.

    A file's split depends on its name and the seed alone: it stays where it is when files come or go.
    """

    def held_out(path: Path) -> bool:
        name = f"{seed}:{path.relative_to(root).as_posix()}"
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < fraction * 2**64

    train = [path for path in files if not held_out(path)]
    validation = [path for path in files if held_out(path)]
    if not train or (fraction > 0 and not validation):
        empty = "validation" if train else "training"
        raise UserError(
            f"data.source.validation_fraction={fraction}: no file of {len(files)} is in the {empty} split.\n"
            f"  {'Raise' if train else 'Lower'} it, or change the seed."
        )
    return train, validation


def read_text(path: Path) -> str:
    """A file's text, every character kept. UserError path:line where it is not UTF-8."""
    contents = path.read_bytes()
    try:
        return contents.decode("utf-8")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{contents[error.start]:02x} is not UTF-8 ({error.reason}).\n"
            "  Re-encode the file as UTF-8, or take it out of the corpus."
        ) from None


def batches_of_files(files: list[Path], target_bytes: int) -> Iterator[list[Path]]:
    """Consecutive files, cut after the one with which a batch reaches `target_bytes`."""
    batch: list[Path] = []
    size = 0
    for path in files:
        batch.append(path)
        size += path.stat().st_size
        if size >= target_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
