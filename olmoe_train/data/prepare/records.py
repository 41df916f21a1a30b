"""Decodes records into documents, or says what is wrong with them. Runs in the worker processes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olmoe_train.config.choices import LearnedTurns, Records, Turns
from olmoe_train.data.chat_template import (
    Conversation,
    Message,
    Span,
    TemplateError,
    assistant_turns,
)
from olmoe_train.data.prepare.batches import DAMAGE, Lines, WholeFiles, Work, chunks, damaged
from olmoe_train.data.prepare.corpus import CorpusFile, FileFormat, split_hash
from olmoe_train.data.prepare.preferences import preference_of
from olmoe_train.data.prepare.record_forms import (
    FormError,
    conversation_of,
    fitting_form,
    json_type,
    string_of,
    without_nulls,
)
from olmoe_train.data.prepare.record_spec import CONVERSATIONS, PREFERENCES, Filtered, RecordSpec
from olmoe_train.utils.errors import UserError


@dataclass(frozen=True)
class Document:
    """The text of a record."""

    text: str
    """May be empty or white space. Such a document is counted, and not trained on."""
    validation: bool
    path: str
    """The corpus file (CorpusFile.path)."""
    target_spans: list[Span] | None = None
    """Characters [start, end) that are training targets, in a conversation or a prompt with its completion.
    None: they could not be found. Of plain text also None: all of it is a target."""
    split_hash: int | None = None
    """Chooses the split. None: the document's file does."""
    counts: tuple[str, ...] = ()
    """Names of TURN_COUNTS that count this document's record, one entry each time."""
    further: bool = False
    """The document is not the first one of its record (data.source.turns=expand)."""
    turns: tuple[Conversation, list[int]] | None = None
    """The conversation and its turns to learn, to try data.source.turns=expand on if they cannot be found."""
    label: int | None = None
    """Of a preference: 1 for a chosen or wanted completion, 0 for another."""
    prompt_end: int = 0
    """Of a preference: the character at which the completion begins."""
    learns_eos: bool = False
    """Of a preference: whether the eos is part of the completion. A chat template writes the end itself."""
    line: int = 1
    """Line or row of the file, from 1. A file that is one document has line 1."""

    @property
    def where(self) -> str:
        """path:line"""
        return f"{self.path}:{self.line}"


# What `olmoe prepare` counts in conversations, by the names that the manifest gives the counts.
TURN_COUNTS = ("empty_turns", "excluded_turns", "system_only", "ends_with_user", "gain_by_expanding")


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
    below: int | None = None
    """Hash below which a document is held out, instead of the fraction."""

    def selects(self, hashed: int) -> bool:
        """Return whether the document with this hash (corpus.split_hash) is held out."""
        return hashed < (self.fraction * 2**64 if self.below is None else self.below)

    def place(self, file: CorpusFile, identity: str) -> tuple[bool, int | None]:
        """Return (whether a document is held out, the split_hash that decides it; None: its file does)."""
        if file.validation:
            return True, None
        hashed = split_hash(identity, self.seed)
        return self.selects(hashed), hashed


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
                yield from _documents(work.file, number, record, spec, validation)
            except _BadRecordError as bad:
                yield BadRecord(f"{work.file.path}:{number}", str(bad), line)
    else:
        for number, row in work.rows:
            try:
                yield from _documents(work.file, number, row, spec, validation)
            except _BadRecordError as bad:
                raw = json.dumps(row, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace")
                kept = raw[: spec.excerpt_bytes] if len(raw) > spec.max_record_bytes else raw
                yield BadRecord(f"{work.file.path}:{number}", str(bad), kept)


def _documents(
    file: CorpusFile,
    number: int,
    record: dict[str, Any] | None,
    spec: RecordSpec,
    validation: ValidationSplit,
) -> Sequence[Document | Filtered]:
    """Make the documents of a record. None is a file without lines, which counts as an empty document."""
    if record is None:
        return [Document("", file.validation, file.path, line=number)]
    if not spec.keeps(record):
        return [Filtered.FILTERED]
    found = _content(record, spec, is_row=file.format is not FileFormat.lines)
    document_id = record.get(spec.id_field) if spec.id_field is not None else None
    # An id stays with its document when the document moves to another line or file.
    identity = f"{file.name}:{number}" if document_id is None else f"id:{document_id}"
    is_validation, hashed = validation.place(file, identity)
    documents = [
        replace(document, validation=is_validation, path=file.path, line=number, split_hash=hashed)
        for document in found
    ]
    counts = documents[0].counts
    if spec.records in PREFERENCES and not all(_is_kept(document, spec) for document in documents):
        return [Filtered.FILTERED]
    kept = [
        replace(document, further=place > 0, counts=() if place else counts)
        for place, document in enumerate(one for one in documents if _is_kept(one, spec))
    ]
    return kept or [Filtered.FILTERED]


def _is_kept(document: Document, spec: RecordSpec) -> bool:
    """Apply the length filters. Empty documents pass, because they are counted as empty, not as filtered."""
    return not document.text.strip() or spec.keeps_length(len(document.text))


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
        raise _BadRecordError(f"a JSON {json_type(record)}, not an object with a field {field!r}")
    return record


def _content(record: dict[str, Any], spec: RecordSpec, is_row: bool) -> list[Document]:
    """Return the documents of a record, without their place and their split."""
    try:
        for field in spec.content_fields:
            if field not in record:
                there = ", ".join(map(repr, list(record)[:10])) or "no fields"
                raise FormError(f"no field {field!r} ({spec.key_of(field)}); it has {there}")
        if is_row and spec.records in (*CONVERSATIONS, *PREFERENCES):
            record = {field: without_nulls(value) for field, value in record.items()}
        if spec.records in PREFERENCES:
            sides = preference_of(record, spec)
            documents = [
                Document(
                    side.text,
                    False,
                    "",
                    side.spans,
                    label=side.label,
                    prompt_end=side.prompt_end,
                    learns_eos=side.is_text,
                )
                for side in sides
            ]
        elif spec.records in CONVERSATIONS:
            conversation = conversation_of(record, spec)
            documents = _of_conversation(conversation, spec)
        else:
            documents = [_of_strings(record, spec)]
    except FormError as error:
        raise _BadRecordError(f"{error}{fitting_form(record, spec)}") from None
    for document in documents:
        _check_text(document.text, spec)
    return documents


def _of_strings(record: dict[str, Any], spec: RecordSpec) -> Document:
    values = [string_of(record[field], field) for field in spec.content_fields]
    text = "".join(values)
    spans = [(len(values[0]), len(text))] if spec.records is Records.prompt_completion else None
    return Document(text, False, "", spans)


def _of_conversation(conversation: Conversation, spec: RecordSpec) -> list[Document]:
    """Render a conversation: as one document, or as one for each turn to learn."""
    assert spec.template is not None
    messages = conversation.messages
    turns = assistant_turns(messages)
    excluded = [index for index in turns if _is_excluded(messages[index])]
    if spec.learn is LearnedTurns.last:
        turns = turns[-1:]
    elif spec.learn is LearnedTurns.marked:
        for index in turns:
            _check_marks(messages[index], index + 1)
        turns = [index for index in turns if index not in excluded]
    try:
        conversation = spec.template.with_text_content(conversation)
        whole = spec.template.render_conversation(conversation, turns)
        expand = spec.turns is Turns.expand and turns
        expanded = spec.template.expand(conversation, turns) if expand else []
    except TemplateError as error:
        raise _BadRecordError(str(error)) from None
    first, *others = expanded or [whole]
    counts = [
        *["empty_turns"] * whole.empty_turns,
        *["excluded_turns"] * len(excluded),
        *["system_only"] * all(message["role"] == "system" for message in messages),
        *["ends_with_user"] * (messages[-1]["role"] == "user"),
    ]
    # A conversation that is expanded cannot gain by it.
    retry = None if expanded or not turns else (conversation, turns)
    return [
        Document(first.text, False, "", first.spans, counts=tuple(counts), turns=retry),
        *(Document(other.text, False, "", other.spans) for other in others),
    ]


def _is_excluded(message: Message) -> bool:
    """Return whether a message says of itself that it is not to be learnt."""
    return message.get("weight") == 0 or message.get("train") == 0  # False equals 0, null does not


def _check_marks(message: Message, number: int) -> None:
    for name in ("weight", "train"):
        if message.get(name) not in (None, 0, 1):
            allowed = "0 or 1" if name == "weight" else "true or false"
            raise FormError(f"the {name!r} of message {number} is {message[name]!r}, not {allowed}")


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
    is_validation, hashed = validation.place(file, file.name)
    if len(contents) > spec.max_record_bytes:
        reason = f"more than data.source.max_record_bytes={spec.max_record_bytes} bytes"
        return BadRecord(f"{file.path}:1", reason, contents[: spec.excerpt_bytes])
    try:
        document = Document(contents.decode("utf-8"), is_validation, file.path, split_hash=hashed)
    except UnicodeDecodeError as error:
        line = contents.count(b"\n", 0, error.start) + 1
        return BadRecord(f"{file.path}:{line}", _not_utf8(contents, error), contents)
    return document if _is_kept(document, spec) else Filtered.FILTERED


def _read(file: CorpusFile, limit: int) -> bytes:
    """Read a file's contents. Of a file with more than `limit` bytes, read just enough to see that."""
    contents = bytearray()
    with Path(file.path).open("rb") as raw:
        for chunk in chunks(raw, file.path):
            contents += chunk
            if len(contents) > limit:
                break
    return bytes(contents)
