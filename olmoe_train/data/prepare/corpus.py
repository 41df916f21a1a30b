"""What a corpus consists of: its parts (files, or splits of a hub dataset) in a fixed order, and which split
a document belongs to."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from olmoe_train.utils.errors import UserError


class Layout(Enum):
    text = "text"
    """The file is one document."""
    lines = "lines"
    """A JSON object a line."""
    parquet = "parquet"
    arrow = "arrow"
    hub = "hub"
    """A split of a dataset that the `datasets` library streams."""


@dataclass(frozen=True)
class Part:
    path: str
    """File; for Layout.hub the split."""
    name: str
    """Path within the corpus: the same wherever the corpus lies. Identifies documents without an id."""
    layout: Layout
    validation: bool
    """All of its documents are validation's."""
    size: int
    """Bytes on disk; 0: unknown."""
    modified_ns: int = 0


_COMPRESSED = (".gz", ".zst")
_LINES = (".jsonl", ".json")
# Never unpacked: members may be called ../../anything.
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z")
# Tests, compiled files and other people's packages.
_NOT_SOURCE = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def layout_of(path: Path) -> Layout:
    """By the name, compression aside: what is not JSON lines, parquet or arrow is text."""
    inner = Path(path.stem) if path.suffix in _COMPRESSED else path
    if inner.suffix in _LINES:
        return Layout.lines
    # Both carry their own compression.
    return {".parquet": Layout.parquet, ".arrow": Layout.arrow}.get(path.suffix, Layout.text)


def find_parts(paths: list[str], validation_paths: list[str]) -> list[Part]:
    """The files that `paths` and `validation_paths` stand for, each once, in order of their names.

    An entry is a file, a glob (`**` for any depth; hidden files are left out, as by a shell) or a directory,
    which stands for the files in it, at any depth, that `_in_a_directory` takes. What validation_paths
    matches is validation's, even where `paths` matches it too. UserError for an entry without
    files, and for archives.
    """
    found: dict[Path, Part] = {}
    for key, patterns in (("paths", paths), ("validation_paths", validation_paths)):
        for pattern in patterns:
            try:
                files, base = _expand(pattern)
            except ValueError:  # pathlib, for a ** that is not a whole component
                files = []
            if not files:
                raise UserError(f"data.source.{key}: {_nothing(pattern)}")
            for path in files:
                if path.name.endswith(_ARCHIVES):
                    raise UserError(f"data.source.{key}: {path} is an archive: unpack it, and give its files")
                found[path] = _part(path, base, validation=key == "validation_paths")
    parts = sorted(found.values(), key=lambda part: (part.name, part.path))
    if all(part.validation for part in parts):
        raise UserError(
            f"data.source.validation_paths={validation_paths}: takes every file of the corpus.\n"
            "  Leave files for training."
        )
    return parts


def _expand(pattern: str) -> tuple[list[Path], Path]:
    """(absolute files, the directory that their names are relative to)"""
    path = Path(pattern).expanduser().absolute()
    found: Iterator[Path]
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        base, found = path, (file for file in path.rglob("*") if _in_a_directory(file))
    else:
        base = path
        while set("*?[") & set(str(base)):
            base = base.parent
        found = base.glob(str(path.relative_to(base))) if base != path else iter(())

    def hidden(file: Path) -> bool:
        return any(name.startswith(".") for name in file.relative_to(base).parts)

    return [file for file in found if file.is_file() and not hidden(file)], base


def _in_a_directory(path: Path) -> bool:
    """Whether a file is taken that was not asked for by name: other .json files and the README of a download
    are no documents."""
    inner = path.name.removesuffix(".gz").removesuffix(".zst")
    compressed_json = inner != path.name and inner.endswith(".json")
    return inner.endswith((".jsonl", ".txt", ".parquet", ".arrow")) or compressed_json


def _nothing(pattern: str) -> str:
    if Path(pattern).expanduser().is_dir():
        return (
            f"{pattern} holds no .jsonl, .json.gz, .json.zst, .txt, .parquet or .arrow file.\n"
            "  For files of another kind, each of them a document, give a glob: "
            f"'{pattern.rstrip('/')}/**/*.py'."
        )
    return (
        f"no file is called or matches {pattern} (seen from {Path.cwd()}).\n"
        "  Give files, globs (`**` only as a whole name between slashes) or folders."
    )


def _part(path: Path, base: Path, validation: bool) -> Part:
    status = path.stat()
    name = path.relative_to(base).as_posix()
    return Part(str(path), name, layout_of(path), validation, status.st_size, status.st_mtime_ns)


def python_stdlib_parts(root: Path) -> list[Part]:
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
    return sorted((_part(path, root, validation=False) for path in files), key=lambda part: part.name)


def held_out(identity: str, fraction: float, seed: int) -> bool:
    """Whether a document is validation's: by its identity and the seed alone, so that it stays where it is
    when others come or go."""
    digest = hashlib.blake2b(f"{seed}:{identity}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def digest(rows: list[Any]) -> str:
    """Of plain values; file names may hold bytes that are not UTF-8."""
    return "sha256:" + hashlib.sha256(repr(rows).encode("utf-8", "surrogateescape")).hexdigest()
