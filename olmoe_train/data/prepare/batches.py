"""A corpus as batches of undecoded records, in order, in bounded memory; workers decode them (records.py).

One process reads: decompressing and cutting into lines costs a hundredth of tokenising, and so a single large
file keeps all workers busy. Reading can start at any Position, which is what resuming needs.
"""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from olmoe_train.data.prepare.corpus import Layout, Part
from olmoe_train.data.prepare.hub import HubDataset
from olmoe_train.data.prepare.record_spec import Reading
from olmoe_train.utils.errors import UserError

# Text a batch: large against the cost of handing it to a process, small against a core's share of the corpus.
BATCH_BYTES = 256 * 1024
# What is kept of a record that is too long: enough to recognise it by.
CUT_BYTES = 1000
_CHUNK = 1 << 20
# zstd turns 4 bytes into up to 128 KiB, and its decompressor gives out all it can at once: at most 4 MiB so.
_ZSTD_INPUT = 128
_ROWS = 256
_BOM = b"\xef\xbb\xbf"
# What the decompressors raise for data that is cut short or changed.
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, pyarrow.ArrowInvalid)


@dataclass(frozen=True)
class Position:
    """Everything before it has been read: parts [0, part), and the first `record` lines or rows of `part`."""

    part: int
    record: int


START = Position(0, 0)


@dataclass(frozen=True)
class Files:
    """Whole files, each a document; the worker reads them."""

    parts: list[Part]


@dataclass(frozen=True)
class Lines:
    part: Part
    lines: list[tuple[int, bytes, int]]
    """(line number from 1, contents, size in bytes); contents are cut to CUT_BYTES if it is too long."""


@dataclass(frozen=True)
class Rows:
    part: Part
    rows: list[tuple[int, dict[str, Any]]]
    """(row number from 1, the columns that Reading.columns asks for)"""


Work = Files | Lines | Rows


@dataclass(frozen=True)
class Batch:
    work: Work
    end: Position
    bytes_read: int
    """Bytes on disk since the batch before, for the progress bar."""


def read_batches(
    parts: list[Part], start: Position, how: Reading, hub: HubDataset | None = None
) -> Iterator[Batch]:
    """Batches of about BATCH_BYTES from `start` on. UserError path:line for damaged files."""
    files: list[Part] = []
    for index in range(start.part, len(parts)):
        part = parts[index]
        if part.layout is Layout.text:
            files.append(part)
            following = parts[index + 1] if index + 1 < len(parts) else None
            size = sum(file.size for file in files)
            if size >= BATCH_BYTES or following is None or following.layout is not Layout.text:
                yield Batch(Files(files), Position(index + 1, 0), size)
                files = []
            continue
        skip = start.record if index == start.part else 0
        lines = part.layout is Layout.lines
        batches = _line_batches(part, skip, how) if lines else _row_batches(part, skip, how, hub)
        for work, records, bytes_read in batches:
            end = Position(index + 1, 0) if records is None else Position(index, records)
            yield Batch(work, end, bytes_read)


def _line_batches(part: Part, skip: int, how: Reading) -> Iterator[tuple[Work, int | None, int]]:
    """(lines, number of the last one or None at the end of the file, bytes read on disk).

    A file without lines has one, which is empty: so it is counted.
    """
    held: list[tuple[int, bytes, int]] = []
    size = number = told = 0
    with Path(part.path).open("rb") as raw:
        try:
            for number, line, length in numbered_lines(chunks(raw, part.path), how.max_record_bytes):
                if number <= skip or not line.strip():
                    continue
                held.append((number, line, length))
                size += len(line)
                if size >= BATCH_BYTES:
                    yield Lines(part, held), number, raw.tell() - told
                    held, size, told = [], 0, raw.tell()
        except DAMAGE as error:
            raise damaged(part.path, number + 1, error) from error
        if not number:
            held = [(1, b"", 0)]
        if held:
            yield Lines(part, held), None, raw.tell() - told


def damaged(path: str, line: int, error: BaseException) -> UserError:
    return UserError(
        f"{path}:{line}: the file is damaged from here on ({error}).\n"
        "  Get it again, or take it out of the corpus; what cannot be read is not quarantined."
    )


def numbered_lines(pieces: Iterator[bytes], limit: int) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, line without its end, its size in bytes) of a stream that comes in `pieces`.

    A line of more than `limit` bytes is cut to CUT_BYTES; never more of it than `limit` and a piece is held.
    """
    pending, dropped, number = b"", 0, 0
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for part in whole:
            number += 1
            yield _line(number, pending + part, dropped, limit)
            pending, dropped = b"", 0
        pending += rest
        if len(pending) + dropped > limit:
            dropped += max(0, len(pending) - CUT_BYTES)
            pending = pending[:CUT_BYTES]
    if pending:
        yield _line(number + 1, pending, dropped, limit)


def _line(number: int, line: bytes, dropped: int, limit: int) -> tuple[int, bytes, int]:
    if number == 1:
        line = line.removeprefix(_BOM)
    size = len(line) + dropped
    return number, line[:CUT_BYTES] if size > limit else line, size


def chunks(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """The contents, decompressed by the file's suffix. Raises one of DAMAGE where they end early."""
    if path.endswith(".zst"):
        yield from _zstd_chunks(raw)
        return
    stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
    while chunk := stream.read(_CHUNK):
        yield chunk


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: zstandard's own stream reader takes a file that is cut short for a whole one."""
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    while data := raw.read(_ZSTD_INPUT):
        while data:
            if frame is None or frame.eof:
                frame = decompressor.decompressobj()
            if out := frame.decompress(data):
                yield out
            data = frame.unused_data if frame.eof else b""
    if frame is not None and not frame.eof:
        raise EOFError("compressed data ends early")


def _row_batches(
    part: Part, skip: int, how: Reading, hub: HubDataset | None
) -> Iterator[tuple[Work, int | None, int]]:
    """(rows, number of the last one or None at the end, bytes read on disk: all with the last batch)"""
    held: list[tuple[int, dict[str, Any]]] = []
    size, number = 0, skip
    for row in _rows(part, skip, how, hub):
        number += 1
        held.append((number, row))
        size += characters(row)
        if size >= BATCH_BYTES:
            yield Rows(part, held), number, 0
            held, size = [], 0
    yield Rows(part, held), None, part.size


def characters(value: Any) -> int:
    """Of all text in a row's value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list) else 1


def _rows(part: Part, skip: int, how: Reading, hub: HubDataset | None) -> Iterator[dict[str, Any]]:
    """Each row after the first `skip`."""
    if part.layout is Layout.hub:
        assert hub is not None
        yield from hub.rows(part.path, skip, how)
        return
    number = 0
    try:
        for table in _tables(part, how):
            if (number := number + table.num_rows) > skip:
                yield from table.slice(max(0, table.num_rows - (number - skip))).to_pylist()
    except DAMAGE as error:
        raise damaged(part.path, number + 1, error) from error


def _tables(part: Part, how: Reading) -> Iterator[pyarrow.RecordBatch]:
    """Record batches of a parquet or arrow file (stream or file format)."""
    if part.layout is Layout.parquet:
        with pyarrow.parquet.ParquetFile(part.path) as file:
            columns = how.columns(part.path, file.schema_arrow.names)
            yield from file.iter_batches(batch_size=_ROWS, columns=columns)
        return
    with pyarrow.memory_map(part.path) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
        columns = how.columns(part.path, reader.schema.names)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            chosen = batch.select(columns)
            yield from (chosen.slice(start, _ROWS) for start in range(0, chosen.num_rows, _ROWS))
