"""From undecoded records to documents, and what is wrong with those that are none. Runs in the workers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe_train.data.corpus import Part, held_out
from olmoe_train.data.reader import CUT_BYTES, DAMAGE, Files, Lines, Reading, Work, chunks, damaged
from olmoe_train.errors import UserError


@dataclass(frozen=True)
class Document:
    text: str
    """May be empty or white space, which is no document to train on; the caller counts it."""
    validation: bool
    where: str
    """path:line"""


@dataclass(frozen=True)
class BadRecord:
    where: str
    """path:line"""
    reason: str
    record: bytes
    """Its contents; the first CUT_BYTES of one that is too long."""

    def error(self) -> UserError:
        return UserError(
            f"{self.where}: {self.reason}.\n  Correct it or take it out of the corpus, or set such records "
            "aside with data.source.on_bad_record=quarantine."
        )


@dataclass(frozen=True)
class Splitting:
    """Who is held out for validation, beside parts that are so as a whole."""

    fraction: float
    seed: int


class _NoDocumentError(Exception):
    """Why a record is none, on its way to the BadRecord."""


def documents(work: Work, how: Reading, splitting: Splitting) -> Iterator[Document | BadRecord]:
    """Each record of a batch, in order. UserError path:line for a damaged compressed file."""
    if isinstance(work, Files):
        for part in work.parts:
            yield _whole_file(part, how, splitting)
        return
    if isinstance(work, Lines):
        for number, line, size in work.lines:
            try:
                text, identity = _parse_line(line, size, how)
            except _NoDocumentError as bad:
                yield BadRecord(f"{work.part.path}:{number}", str(bad), line)
            else:
                yield _document(work.part, number, text, identity, splitting)
        return
    for number, text, identity in work.rows:
        try:
            _check_text(text, how)
        except _NoDocumentError as bad:
            raw = text if isinstance(text, str) else json.dumps(text, default=repr)
            contents = raw.encode("utf-8", "backslashreplace")
            yield BadRecord(
                f"{work.part.path}:{number}",
                str(bad),
                contents[:CUT_BYTES] if len(contents) > how.max_record_bytes else contents,
            )
        else:
            yield _document(work.part, number, text, identity, splitting)


def _document(part: Part, number: int, text: str, identity: Any, splitting: Splitting) -> Document:
    # An id stays with a document when it moves to another line or file.
    name = f"{part.name}:{number}" if identity is None else f"id:{identity}"
    validation = part.validation or held_out(name, splitting.fraction, splitting.seed)
    return Document(text, validation, f"{part.path}:{number}")


def _parse_line(line: bytes, size: int, how: Reading) -> tuple[str, Any]:
    """(text, id or None). _NoDocumentError for what is no record with a text."""
    _check_size(size, how)
    if not line:  # a file without lines: counted as an empty document
        return "", None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _NoDocumentError(_not_utf8(line, error)) from None
    except json.JSONDecodeError as error:
        raise _NoDocumentError(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise _NoDocumentError(f"malformed JSON: {error}") from None
    if not isinstance(record, dict):
        raise _NoDocumentError(f"a JSON {_json_type(record)}, not an object with a field {how.text_field!r}")
    if how.text_field not in record:
        fields = ", ".join(map(repr, list(record)[:10])) or "no fields"
        raise _NoDocumentError(f"no field {how.text_field!r} (data.source.text_field); it has {fields}")
    _check_text(record[how.text_field], how)
    identity = record.get(how.id_field) if how.id_field is not None else None
    return record[how.text_field], identity


def _check_text(text: Any, how: Reading) -> None:
    if not isinstance(text, str):
        raise _NoDocumentError(f"its {how.text_field!r} is a JSON {_json_type(text)}, not a string")
    try:
        _check_size(len(text.encode("utf-8")), how)
    except UnicodeEncodeError as error:  # JSON can spell "\ud800" alone, no encoding of Unicode can
        half = f"\\u{ord(text[error.start]):04x}"
        raise _NoDocumentError(
            f"its {how.text_field!r} has half a surrogate pair, {half}, at {error.start}"
        ) from None


def _check_size(size: int, how: Reading) -> None:
    if size > how.max_record_bytes:
        raise _NoDocumentError(
            f"{size:,} bytes, more than data.source.max_record_bytes={how.max_record_bytes}"
        )


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _not_utf8(contents: bytes, error: UnicodeDecodeError) -> str:
    return f"byte 0x{contents[error.start]:02x} is not UTF-8 ({error.reason})"


def _whole_file(part: Part, how: Reading, splitting: Splitting) -> Document | BadRecord:
    """A file's text, every character kept."""
    try:
        contents = _read(part, how.max_record_bytes)
    except DAMAGE as error:
        raise damaged(part.path, 1, error) from error
    validation = part.validation or held_out(part.name, splitting.fraction, splitting.seed)
    if len(contents) > how.max_record_bytes:
        reason = f"more than data.source.max_record_bytes={how.max_record_bytes} bytes"
        return BadRecord(f"{part.path}:1", reason, contents[:CUT_BYTES])
    try:
        return Document(contents.decode("utf-8"), validation, f"{part.path}:1")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        return BadRecord(f"{part.path}:{line}", _not_utf8(contents, error), contents)


def _read(part: Part, limit: int) -> bytes:
    """The file's contents; of one with more than `limit` bytes, enough to see that."""
    contents = bytearray()
    with Path(part.path).open("rb") as raw:
        for chunk in chunks(raw, part.path):
            contents += chunk
            if len(contents) > limit:
                break
    return bytes(contents)
