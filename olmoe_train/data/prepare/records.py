"""Decodes records into documents, or says what is wrong with them. Runs in the worker processes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe_train.config.choices import Records
from olmoe_train.data.chat_template import Message, Span, TemplateError
from olmoe_train.data.prepare.batches import DAMAGE, Lines, WholeFiles, Work, chunks, damaged
from olmoe_train.data.prepare.corpus import CorpusFile, held_out
from olmoe_train.data.prepare.record_spec import Filtered, RecordSpec
from olmoe_train.utils.errors import UserError


@dataclass(frozen=True)
class Document:
    """The text of a record."""

    text: str
    """May be empty or white space. Such a document is counted, and not trained on."""
    validation: bool
    where: str
    """path:line"""
    target_spans: list[Span] | None = None
    """Characters [start, end) that are training targets, in a conversation or a prompt with its completion.
    None: they could not be found. Of plain text also None: all of it is a target."""


@dataclass(frozen=True)
class BadRecord:
    """A record that is not a document."""

    where: str
    """path:line"""
    reason: str
    record: bytes
    """Its contents, or an excerpt if it is too long."""

    def error(self) -> UserError:
        """Return the error of a strict run."""
        return UserError(
            f"{self.where}: {self.reason}.\n  Correct it or take it out of the corpus, or set such records "
            "aside with data.source.on_bad_record=quarantine."
        )


@dataclass(frozen=True)
class ValidationSplit:
    """Selects validation documents by a hash, besides the files that belong to validation as a whole."""

    fraction: float
    """Expected share of the documents."""
    seed: int


class _BadRecordError(Exception):
    """Reason why a record is bad, until a BadRecord is made of it."""


def documents(
    work: Work, spec: RecordSpec, validation: ValidationSplit
) -> Iterator[Document | BadRecord | Filtered]:
    """Decode each record of a batch, in order.

    Raises:
        UserError: A compressed file is damaged. The message names path:line.
    """
    if isinstance(work, WholeFiles):
        for file in work.files:
            yield _whole_file(file, spec, validation)
    elif isinstance(work, Lines):
        for number, line, size in work.lines:
            try:
                record = _parse_line(line, size, spec)
                yield _document(work.file, number, record, spec, validation)
            except _BadRecordError as bad:
                yield BadRecord(f"{work.file.path}:{number}", str(bad), line)
    else:
        for number, row in work.rows:
            try:
                yield _document(work.file, number, row, spec, validation)
            except _BadRecordError as bad:
                raw = json.dumps(row, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace")
                kept = raw[: spec.excerpt_bytes] if len(raw) > spec.max_record_bytes else raw
                yield BadRecord(f"{work.file.path}:{number}", str(bad), kept)


def _document(
    file: CorpusFile,
    number: int,
    record: dict[str, Any] | None,
    spec: RecordSpec,
    validation: ValidationSplit,
) -> Document | Filtered:
    """Make a document of a record. None is a file without lines, which counts as an empty document."""
    where = f"{file.path}:{number}"
    if record is None:
        return Document("", file.validation, where)
    if not spec.keeps(record):
        return Filtered.FILTERED
    text, spans = _content(record, spec)
    document_id = record.get(spec.id_field) if spec.id_field is not None else None
    # An id stays with its document when the document moves to another line or file.
    identity = f"{file.name}:{number}" if document_id is None else f"id:{document_id}"
    is_validation = file.validation or held_out(identity, validation.fraction, validation.seed)
    return _filter_by_length(Document(text, is_validation, where, spans), spec)


def _filter_by_length(document: Document, spec: RecordSpec) -> Document | Filtered:
    """Apply the length filters. Empty documents pass, because they are counted as empty, not as filtered."""
    empty = not document.text.strip()
    return document if empty or spec.keeps_length(len(document.text)) else Filtered.FILTERED


def _parse_line(line: bytes, size: int, spec: RecordSpec) -> dict[str, Any] | None:
    """Parse a line as a JSON object. None for the empty line that stands for a file without lines."""
    _check_size(size, spec)
    if not line:
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRecordError(_not_utf8(line, error)) from None
    except json.JSONDecodeError as error:
        raise _BadRecordError(f"malformed JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; deeply nested brackets
        raise _BadRecordError(f"malformed JSON: {error}") from None
    if not isinstance(record, dict):
        field = spec.content_fields[0]
        raise _BadRecordError(f"a JSON {_json_type(record)}, not an object with a field {field!r}")
    return record


def _content(record: dict[str, Any], spec: RecordSpec) -> tuple[str, list[Span] | None]:
    """Return the text of a record and its target spans (Document.target_spans)."""
    for field in spec.content_fields:
        if field not in record:
            there = ", ".join(map(repr, list(record)[:10])) or "no fields"
            raise _BadRecordError(f"no field {field!r} ({spec.key_of(field)}); it has {there}")
    values = [record[field] for field in spec.content_fields]
    spans: list[Span] | None = None
    if spec.records is Records.messages:
        assert spec.template is not None
        try:
            text, spans = spec.template.render_conversation(_messages(values[0], spec.content_fields[0]))
        except TemplateError as error:
            raise _BadRecordError(str(error)) from None
    else:
        for field, value in zip(spec.content_fields, values, strict=True):
            if not isinstance(value, str):
                raise _BadRecordError(f"its {field!r} is a JSON {_json_type(value)}, not a string")
        text = "".join(values)
        if spec.records is Records.prompt_completion:
            spans = [(len(values[0]), len(text))]
    _check_text(text, spec)
    return text, spans


def _messages(value: Any, field: str) -> list[Message]:
    """Check that a value is a list of messages, each with a role and a content that are strings."""
    if not isinstance(value, list):
        raise _BadRecordError(f"its {field!r} is a JSON {_json_type(value)}, not a list")
    if not value:
        raise _BadRecordError(f"its {field!r} has no message")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _BadRecordError(f"message {number} is a JSON {_json_type(message)}, not an object")
        for name in ("role", "content"):
            if name not in message:
                raise _BadRecordError(f"message {number} has no {name!r}")
            if not isinstance(message[name], str):
                kind = _json_type(message[name])
                raise _BadRecordError(f"the {name!r} of message {number} is a JSON {kind}, not a string")
    return value


def _check_text(text: str, spec: RecordSpec) -> None:
    try:
        _check_size(len(text.encode("utf-8")), spec)
    except UnicodeEncodeError as error:  # JSON allows a lone "\ud800", UTF-8 does not
        half = f"\\u{ord(text[error.start]):04x}"
        field = " + ".join(map(repr, spec.content_fields))
        raise _BadRecordError(f"its {field} has half a surrogate pair, {half}, at {error.start}") from None


def _check_size(size: int, spec: RecordSpec) -> None:
    if size > spec.max_record_bytes:
        raise _BadRecordError(
            f"{size:,} bytes, more than data.source.max_record_bytes={spec.max_record_bytes}"
        )


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _not_utf8(contents: bytes, error: UnicodeDecodeError) -> str:
    return f"byte 0x{contents[error.start]:02x} is not UTF-8 ({error.reason})"


def _whole_file(
    file: CorpusFile, spec: RecordSpec, validation: ValidationSplit
) -> Document | BadRecord | Filtered:
    """Make a document of a file's text, with every character kept."""
    try:
        contents = _read(file, spec.max_record_bytes)
    except DAMAGE as error:
        raise damaged(file.path, 1, error) from error
    is_validation = file.validation or held_out(file.name, validation.fraction, validation.seed)
    if len(contents) > spec.max_record_bytes:
        reason = f"more than data.source.max_record_bytes={spec.max_record_bytes} bytes"
        return BadRecord(f"{file.path}:1", reason, contents[: spec.excerpt_bytes])
    try:
        document = Document(contents.decode("utf-8"), is_validation, f"{file.path}:1")
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        return BadRecord(f"{file.path}:{line}", _not_utf8(contents, error), contents)
    return _filter_by_length(document, spec)


def _read(file: CorpusFile, limit: int) -> bytes:
    """Read a file's contents. Of a file with more than `limit` bytes, read just enough to see that."""
    contents = bytearray()
    with Path(file.path).open("rb") as raw:
        for chunk in chunks(raw, file.path):
            contents += chunk
            if len(contents) > limit:
                break
    return bytes(contents)
