"""Reads a corpus as batches of undecoded records, in order and in bounded memory.

One process reads, and workers decode and tokenize the batches (records.py, encode.py). Decompressing and
splitting into lines costs a hundredth of tokenizing, so a single large file keeps all workers busy. Reading
can start at any Position, which is what resuming needs.
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

from olmoe_train.data.prepare.corpus import CorpusFile, FileFormat
from olmoe_train.data.prepare.hub import HubDataset
from olmoe_train.data.prepare.limits import DEFAULT_LIMITS, Limits
from olmoe_train.data.prepare.record_spec import RecordSpec
from olmoe_train.utils.errors import UserError

_CHUNK = 1 << 20  # bytes read at a time
# zstd expands 4 bytes to up to 128 KiB, and its decompressor returns all it can at once: at most 4 MiB for
# 128 bytes of input.
_ZSTD_INPUT = 128
_BOM = b"\xef\xbb\xbf"
# The exceptions that the decompressors raise for truncated or corrupted data.
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError, pyarrow.ArrowInvalid)


@dataclass(frozen=True)
class Position:
    """A place in the corpus: files [0, part) and the first `record` lines or rows of file `part` are read.

    Stored in progress.json.
    """

    part: int
    record: int


START = Position(0, 0)


@dataclass(frozen=True)
class WholeFiles:
    """Files that are one document each. The worker reads them."""

    files: list[CorpusFile]


@dataclass(frozen=True)
class Lines:
    """Lines of a file of JSON lines."""

    file: CorpusFile
    lines: list[tuple[int, bytes, int]]
    """(line number from 1, contents, size in bytes). A line that is too long has an excerpt as contents."""


@dataclass(frozen=True)
class Rows:
    """Rows of a table."""

    file: CorpusFile
    rows: list[tuple[int, dict[str, Any]]]
    """(row number from 1, the columns that RecordSpec.columns selects)"""


Work = WholeFiles | Lines | Rows


@dataclass(frozen=True)
class Batch:
    """What a worker encodes at a time."""

    work: Work
    end: Position
    """Position after the batch."""
    bytes_read: int
    """Bytes read from disk since the batch before, for the progress bar."""


def read_batches(
    files: list[CorpusFile],
    start: Position,
    spec: RecordSpec,
    hub: HubDataset | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[Batch]:
    """Read the corpus from a position on, in batches of about `limits.batch_bytes`.

    Args:
        files: The files of the corpus.
        start: Where to begin.
        spec: How records are read.
        hub: The dataset that files of FileFormat.hub are splits of.
        limits: Sizes of batches and reads.

    Raises:
        UserError: A file is damaged. The message names path:line.
    """
    whole: list[CorpusFile] = []
    for index in range(start.part, len(files)):
        file = files[index]
        if file.format is FileFormat.text:
            whole.append(file)
            following = files[index + 1] if index + 1 < len(files) else None
            size = sum(file.size for file in whole)
            if size >= limits.batch_bytes or following is None or following.format is not FileFormat.text:
                yield Batch(WholeFiles(whole), Position(index + 1, 0), size)
                whole = []
            continue
        skip = start.record if index == start.part else 0
        if file.format is FileFormat.lines:
            batches = _line_batches(file, skip, spec, limits)
        else:
            batches = _row_batches(file, skip, spec, hub, limits)
        for work, records, bytes_read in batches:
            end = Position(index + 1, 0) if records is None else Position(index, records)
            yield Batch(work, end, bytes_read)


def _line_batches(
    file: CorpusFile, skip: int, spec: RecordSpec, limits: Limits
) -> Iterator[tuple[Work, int | None, int]]:
    """Yield (lines, number of the last one or None at the end of the file, bytes read from disk).

    A file without lines yields one empty line, so that it is counted as an empty document.
    """
    held: list[tuple[int, bytes, int]] = []
    size = number = reported = 0
    with Path(file.path).open("rb") as raw:
        try:
            lines = numbered_lines(chunks(raw, file.path), spec.max_record_bytes, spec.excerpt_bytes)
            for number, line, length in lines:
                if number <= skip or not line.strip():
                    continue
                held.append((number, line, length))
                size += len(line)
                if size >= limits.batch_bytes:
                    yield Lines(file, held), number, raw.tell() - reported
                    held, size, reported = [], 0, raw.tell()
        except DAMAGE as error:
            raise damaged(file.path, number + 1, error) from error
        if not number:
            held = [(1, b"", 0)]
        if held:
            yield Lines(file, held), None, raw.tell() - reported


def damaged(path: str, line: int, error: BaseException) -> UserError:
    """Return the error for a file that cannot be read past `line`."""
    return UserError(
        f"{path}:{line}: the file is damaged from here on ({error}).\n"
        "  Get it again, or take it out of the corpus. Only records can be quarantined, not damaged files."
    )


def numbered_lines(
    pieces: Iterator[bytes], limit: int, excerpt_bytes: int
) -> Iterator[tuple[int, bytes, int]]:
    """Split a stream into lines and yield (number from 1, line without its newline, size in bytes).

    Of a line of more than `limit` bytes, only the first `excerpt_bytes` are yielded. At most `limit` bytes of
    a line and one piece of the stream are in memory.
    """
    pending, dropped, number = b"", 0, 0
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for part in whole:
            number += 1
            yield _line(number, pending + part, dropped, limit, excerpt_bytes)
            pending, dropped = b"", 0
        pending += rest
        if len(pending) + dropped > limit:
            dropped += max(0, len(pending) - excerpt_bytes)
            pending = pending[:excerpt_bytes]
    if pending:
        yield _line(number + 1, pending, dropped, limit, excerpt_bytes)


def _line(number: int, line: bytes, dropped: int, limit: int, excerpt_bytes: int) -> tuple[int, bytes, int]:
    if number == 1:
        line = line.removeprefix(_BOM)
    size = len(line) + dropped
    return number, line[:excerpt_bytes] if size > limit else line, size


def chunks(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """Yield a file's contents, decompressed by its suffix. Raises one of DAMAGE if they end early."""
    if path.endswith(".zst"):
        yield from _zstd_chunks(raw)
        return
    stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
    while chunk := stream.read(_CHUNK):
        yield chunk


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """Decompress frame by frame, because zstandard's stream reader does not notice a truncated file."""
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
    file: CorpusFile, skip: int, spec: RecordSpec, hub: HubDataset | None, limits: Limits
) -> Iterator[tuple[Work, int | None, int]]:
    """Yield (rows, number of the last one or None at the end, bytes on disk: all with the last batch)."""
    held: list[tuple[int, dict[str, Any]]] = []
    size, number = 0, skip
    for row in _rows(file, skip, spec, hub, limits):
        number += 1
        held.append((number, row))
        size += characters(row)
        if size >= limits.batch_bytes:
            yield Rows(file, held), number, 0
            held, size = [], 0
    yield Rows(file, held), None, file.size


def characters(value: Any) -> int:
    """Count the characters of all text in a JSON value. A number or null counts as one."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list) else 1


def _rows(
    file: CorpusFile, skip: int, spec: RecordSpec, hub: HubDataset | None, limits: Limits
) -> Iterator[dict[str, Any]]:
    """Yield each row after the first `skip`."""
    if file.format is FileFormat.hub:
        assert hub is not None
        yield from hub.rows(file.path, skip, spec, limits.rows_per_read)
        return
    number = 0
    try:
        for table in _tables(file, spec, limits.rows_per_read):
            if (number := number + table.num_rows) > skip:
                yield from table.slice(max(0, table.num_rows - (number - skip))).to_pylist()
    except DAMAGE as error:
        raise damaged(file.path, number + 1, error) from error


def _tables(file: CorpusFile, spec: RecordSpec, rows_per_read: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield record batches of a parquet file, or of an arrow file in stream or file format."""
    if file.format is FileFormat.parquet:
        with pyarrow.parquet.ParquetFile(file.path) as parquet:
            columns = spec.columns(file.path, parquet.schema_arrow.names)
            yield from parquet.iter_batches(batch_size=rows_per_read, columns=columns)
        return
    with pyarrow.memory_map(file.path) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
        columns = spec.columns(file.path, reader.schema.names)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            selected = batch.select(columns)
            starts = range(0, selected.num_rows, rows_per_read)
            yield from (selected.slice(start, rows_per_read) for start in starts)
