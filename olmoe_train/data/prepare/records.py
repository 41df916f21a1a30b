"""From undecoded records to documents, and what is wrong with those that are none. Runs in the workers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe_train.config.choices import Records
from olmoe_train.data.chat_template import Message, Span, TemplateError
from olmoe_train.data.prepare.batches import CUT_BYTES, DAMAGE, Files, Lines, Work, chunks, damaged
from olmoe_train.data.prepare.corpus import Part, held_out
from olmoe_train.data.prepare.record_spec import Filtered, Reading
from olmoe_train.utils.errors import UserError


@dataclass(frozen=True)
class Document:
    text: str
    """May be empty or white space, which is no document to train on; the caller counts it."""
    validation: bool
    where: str
    """path:line"""
    turns: list[Span] | None = None
    """Of a conversation, or a prompt and its completion: the characters to be learnt; None: they cannot be
    told. Of plain text: None, for all of it is learnt."""


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


def documents(work: Work, how: Reading, splitting: Splitting) -> Iterator[Document | BadRecord | Filtered]:
    """Each record of a batch, in order. UserError path:line for a damaged compressed file."""
    if isinstance(work, Files):
        for part in work.parts:
            yield _whole_file(part, how, splitting)
    elif isinstance(work, Lines):
        for number, line, size in work.lines:
            try:
                record = _parse_line(line, size, how)
                yield _document(work.part, number, record, how, splitting)
            except _NoDocumentError as bad:
                yield BadRecord(f"{work.part.path}:{number}", str(bad), line)
    else:
        for number, row in work.rows:
            try:
                yield _document(work.part, number, row, how, splitting)
            except _NoDocumentError as bad:
                raw = json.dumps(row, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace")
                kept = raw[:CUT_BYTES] if len(raw) > how.max_record_bytes else raw
                yield BadRecord(f"{work.part.path}:{number}", str(bad), kept)


def _document(
    part: Part, number: int, record: dict[str, Any] | None, how: Reading, splitting: Splitting
) -> Document | Filtered:
    """record: None for a file without lines, which counts as an empty document."""
    where = f"{part.path}:{number}"
    if record is None:
        return Document("", part.validation, where)
    if not how.wants(record):
        return Filtered.FILTERED
    text, turns = _content(record, how)
    identity = record.get(how.id_field) if how.id_field is not None else None
    # An id stays with a document when it moves to another line or file.
    name = f"{part.name}:{number}" if identity is None else f"id:{identity}"
    validation = part.validation or held_out(name, splitting.fraction, splitting.seed)
    return _if_wanted(Document(text, validation, where, turns), how)


def _if_wanted(document: Document, how: Reading) -> Document | Filtered:
    """Empty documents are counted as such, whatever their length should be."""
    empty = not document.text.strip()
    return document if empty or how.wants_length(len(document.text)) else Filtered.FILTERED


def _parse_line(line: bytes, size: int, how: Reading) -> dict[str, Any] | None:
    """_NoDocumentError for what is no JSON object. None for a file without lines."""
    _check_size(size, how)
    if not line:
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _NoDocumentError(_not_utf8(line, error)) from None
    except json.JSONDecodeError as error:
        raise _NoDocumentError(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise _NoDocumentError(f"malformed JSON: {error}") from None
    if not isinstance(record, dict):
        field = how.content_fields[0]
        raise _NoDocumentError(f"a JSON {_json_type(record)}, not an object with a field {field!r}")
    return record


def _content(record: dict[str, Any], how: Reading) -> tuple[str, list[Span] | None]:
    """(text, what of it is to be learnt, as Document says). _NoDocumentError for a record without them."""
    for field in how.content_fields:
        if field not in record:
            there = ", ".join(map(repr, list(record)[:10])) or "no fields"
            raise _NoDocumentError(f"no field {field!r} ({how.key_of(field)}); it has {there}")
    values = [record[field] for field in how.content_fields]
    turns: list[Span] | None = None
    if how.records is Records.messages:
        assert how.template is not None
        try:
            text, turns = how.template.render_conversation(_messages(values[0], how.content_fields[0]))
        except TemplateError as error:
            raise _NoDocumentError(str(error)) from None
    else:
        for field, value in zip(how.content_fields, values, strict=True):
            if not isinstance(value, str):
                raise _NoDocumentError(f"its {field!r} is a JSON {_json_type(value)}, not a string")
        text = "".join(values)
        if how.records is Records.prompt_completion:
            turns = [(len(values[0]), len(text))]
    _check_text(text, how)
    return text, turns


def _messages(value: Any, field: str) -> list[Message]:
    """_NoDocumentError unless it is a list of messages, each with a role and a content that are strings."""
    if not isinstance(value, list):
        raise _NoDocumentError(f"its {field!r} is a JSON {_json_type(value)}, not a list")
    if not value:
        raise _NoDocumentError(f"its {field!r} has no message")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _NoDocumentError(f"message {number} is a JSON {_json_type(message)}, not an object")
        for name in ("role", "content"):
            if name not in message:
                raise _NoDocumentError(f"message {number} has no {name!r}")
            if not isinstance(message[name], str):
                kind = _json_type(message[name])
                raise _NoDocumentError(f"the {name!r} of message {number} is a JSON {kind}, not a string")
    return value


def _check_text(text: str, how: Reading) -> None:
    try:
        _check_size(len(text.encode("utf-8")), how)
    except UnicodeEncodeError as error:  # JSON can spell "\ud800" alone, no encoding of Unicode can
        half = f"\\u{ord(text[error.start]):04x}"
        field = " + ".join(map(repr, how.content_fields))
        raise _NoDocumentError(f"its {field} has half a surrogate pair, {half}, at {error.start}") from None


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


def _whole_file(part: Part, how: Reading, splitting: Splitting) -> Document | BadRecord | Filtered:
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
        return _if_wanted(Document(contents.decode("utf-8"), validation, f"{part.path}:1"), how)
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
