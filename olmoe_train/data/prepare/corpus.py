"""Finds the files of a corpus in a fixed order, and decides which split a document belongs to."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from olmoe_train.utils.errors import UserError


class FileFormat(Enum):
    """How the documents of a corpus file are stored."""

    text = "text"
    """The file is one document."""
    lines = "lines"
    """One JSON object per line."""
    parquet = "parquet"
    arrow = "arrow"
    hub = "hub"
    """A split of a dataset that the `datasets` library streams."""


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus, or a split of a streamed dataset."""

    path: str
    """Absolute path. With FileFormat.hub: name of the split."""
    name: str
    """Path relative to the corpus, wherever the corpus lies. It identifies documents without an id."""
    format: FileFormat
    validation: bool
    """Whether all of its documents belong to the validation split."""
    size: int
    """Bytes on disk. 0: unknown."""
    modified_ns: int = 0
    """Time of the last modification, in nanoseconds since the epoch."""


_COMPRESSED = (".gz", ".zst")
_LINES = (".jsonl", ".json")
# Archives are never unpacked: a member may be named ../../anything.
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z")
# Tests, compiled files and installed packages are not source of the standard library.
_NOT_SOURCE = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def file_format(path: Path) -> FileFormat:
    """Return the format by the file's name. What is not JSON lines, parquet or arrow is text."""
    inner = Path(path.stem) if path.suffix in _COMPRESSED else path
    if inner.suffix in _LINES:
        return FileFormat.lines
    # Parquet and arrow files have their own compression.
    return {".parquet": FileFormat.parquet, ".arrow": FileFormat.arrow}.get(path.suffix, FileFormat.text)


def find_files(paths: list[str], validation_paths: list[str]) -> list[CorpusFile]:
    """Find the files that data.source.paths and data.source.validation_paths name.

    Args:
        paths: Files, globs (`**` for any depth; hidden files are skipped, as by a shell) and directories. A
            directory stands for those files in it, at any depth, that `_is_document_file` accepts.
        validation_paths: The same for validation files. A file that both match belongs to validation.

    Returns:
        Each file once, sorted by its name.

    Raises:
        UserError: An entry matches no file or an archive, or no file is left for training.
    """
    found: dict[Path, CorpusFile] = {}
    for key, patterns in (("paths", paths), ("validation_paths", validation_paths)):
        for pattern in patterns:
            try:
                files, base = _expand(pattern)
            except ValueError:  # raised by pathlib for a ** that is not a whole path component
                files = []
            if not files:
                raise UserError(f"data.source.{key}: {_no_match(pattern)}")
            for path in files:
                if path.name.endswith(_ARCHIVES):
                    raise UserError(f"data.source.{key}: {path} is an archive: unpack it and give its files")
                found[path] = _corpus_file(path, base, validation=key == "validation_paths")
    corpus_files = sorted(found.values(), key=lambda file: (file.name, file.path))
    if all(file.validation for file in corpus_files):
        raise UserError(
            f"data.source.validation_paths={validation_paths}: takes every file of the corpus.\n"
            "  Leave some files for training."
        )
    return corpus_files


def _expand(pattern: str) -> tuple[list[Path], Path]:
    """Return (absolute paths of the files, the directory that their names are relative to)."""
    path = Path(pattern).expanduser().absolute()
    found: Iterator[Path]
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        base, found = path, (file for file in path.rglob("*") if _is_document_file(file))
    else:
        base = path
        while set("*?[") & set(str(base)):
            base = base.parent
        found = base.glob(str(path.relative_to(base))) if base != path else iter(())

    def hidden(file: Path) -> bool:
        return any(name.startswith(".") for name in file.relative_to(base).parts)

    return [file for file in found if file.is_file() and not hidden(file)], base


def _is_document_file(path: Path) -> bool:
    """Return whether a file in a directory is taken. Of a download, the README and plain .json files are not
    documents; a .json file is taken only if it is compressed, or named explicitly.
    """
    inner = path.name.removesuffix(".gz").removesuffix(".zst")
    compressed_json = inner != path.name and inner.endswith(".json")
    return inner.endswith((".jsonl", ".txt", ".parquet", ".arrow")) or compressed_json


def _no_match(pattern: str) -> str:
    if Path(pattern).expanduser().is_dir():
        return (
            f"{pattern} holds no .jsonl, .json.gz, .json.zst, .txt, .parquet or .arrow file.\n"
            "  If its files are of another kind, each of them one document, give a glob: "
            f"'{pattern.rstrip('/')}/**/*.py'."
        )
    return (
        f"no file is called or matches {pattern} (current directory: {Path.cwd()}).\n"
        "  Give files, globs (`**` only as a whole name between slashes) or directories."
    )


def _corpus_file(path: Path, base: Path, validation: bool) -> CorpusFile:
    status = path.stat()
    name = path.relative_to(base).as_posix()
    return CorpusFile(str(path), name, file_format(path), validation, status.st_size, status.st_mtime_ns)


def python_stdlib_files(root: Path) -> list[CorpusFile]:
    """Find the Python files of the standard library at `root` (about 12 MB), sorted by their names.

    Files that the interpreter's build generates (config-*/, _sysconfigdata*.py) are left out, because they
    differ between machines.
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
    return sorted((_corpus_file(path, root, validation=False) for path in files), key=lambda file: file.name)


def split_hash(identity: str, seed: int) -> int:
    """Return a number in [0, 2^64) that chooses the split of a document: the smallest ones are held out.

    It depends only on the arguments, so a document keeps its split when others are added or removed.

    Args:
        identity: What identifies the document: its id, or its file and line.
        seed: Selects which documents are held out.
    """
    digest = hashlib.blake2b(f"{seed}:{identity}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def digest(rows: list[Any]) -> str:
    """Hash a list of plain values (SHA-256). File names in it may contain bytes that are not UTF-8."""
    return "sha256:" + hashlib.sha256(repr(rows).encode("utf-8", "surrogateescape")).hexdigest()
