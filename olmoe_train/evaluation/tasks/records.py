"""Reads the records of a task file, and says what is wrong with one."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from olmoe_train.data.prepare.batches import DAMAGE, chunks, numbered_lines
from olmoe_train.data.prepare.record_forms import json_type
from olmoe_train.evaluation.tasks.task import TaskFormat
from olmoe_train.utils.errors import UserError

_REMARKS = ("id", "source", "category", "comment")
_FIELDS = ("query", "context", "choices", "gold", *_REMARKS)


@dataclass(frozen=True)
class Record:
    """A question as its file has it."""

    asked: str
    """The query, or the context."""
    verbatim: bool
    """Whether it is a context, which the prompt does not surround."""
    choices: tuple[str, ...]
    gold: int
    where: str
    """path:line"""


def read_records(path: Path, form: TaskFormat) -> Iterator[Record]:
    """Read a file of JSON lines. Blank lines do not count.

    Args:
        path: The file, also with .gz or .zst.
        form: Format of the task, on which the number of choices depends.

    Raises:
        UserError: The file cannot be read, has no record, or one is wrong. The message names path:line.
    """
    number, found = 0, False
    try:
        with path.open("rb") as raw:
            for number, line, _ in numbered_lines(chunks(raw, str(path)), sys.maxsize, 0):
                if line.strip():
                    found = True
                    yield _record(line, f"{path}:{number}", form)
    except DAMAGE as error:
        raise UserError(f"{path}:{number + 1}: the file is damaged from here on ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not found:
        raise UserError(f"{path}: is empty; give it one JSON object per line")


def _record(line: bytes, where: str, form: TaskFormat) -> Record:
    fields = json_object(line, where)
    for key in fields:
        if key not in _FIELDS:
            raise UserError(
                f"{where}: {key!r} has no meaning here; a record has query or context, choices and gold, and "
                f"may have {', '.join(_REMARKS)}"
            )
    asked, verbatim = _asked(fields, where, form)
    choices = _choices(fields, where, form)
    gold = fields.get("gold")
    if type(gold) is not int or not 0 <= gold < len(choices):  # true is an int to isinstance
        found = json.dumps(gold) if "gold" in fields else "missing"
        raise UserError(
            f"{where}: gold is {found}; give the index of the right choice, from 0 to {len(choices) - 1}"
        )
    return Record(asked, verbatim, choices, gold, where)


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """Parse a line that has to be a JSON object. UserError, with `where` (path:line), if it is none."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; each line is one JSON object"
        ) from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; deeply nested brackets
        raise UserError(f"{where}: not JSON: {error}; each line is one JSON object") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: is a JSON {json_type(fields)}; each line is one JSON object")
    return fields


def _asked(fields: dict[str, Any], where: str, form: TaskFormat) -> tuple[str, bool]:
    """(The query or the context, whether it is the context)."""
    given = [key for key in ("query", "context") if key in fields]
    if len(given) != 1:
        count = "both query and context" if given else "neither query nor context"
        raise UserError(
            f"{where}: has {count}; give a query, which the prompt surrounds, or a context, which is used as "
            "it is"
        )
    (key,) = given
    check_text(fields[key], key, where)
    if key == "query" and not fields[key].strip():
        raise UserError(f"{where}: query is empty; give the question")
    if key == "context" and form is TaskFormat.mc:
        raise UserError(
            f"{where}: has a context, and format=mc lists the choices after a query; give a query, or use "
            "format=rc"
        )
    return fields[key], key == "context"


def _choices(fields: dict[str, Any], where: str, form: TaskFormat) -> tuple[str, ...]:
    choices = fields.get("choices")
    if not isinstance(choices, list):
        found = json_type(choices) if "choices" in fields else "missing"
        raise UserError(f"{where}: choices is {found}; give a list of strings")
    for index, choice in enumerate(choices):
        check_text(choice, f"choices[{index}]", where)
        if not choice.strip():
            raise UserError(f"{where}: choices[{index}] is empty; give some text, or leave it out")
        if choice.removeprefix(" ") in [other.removeprefix(" ") for other in choices[:index]]:
            raise UserError(f"{where}: choices[{index}]={choice!r} is there twice; give different choices")
    least = 1 if form is TaskFormat.bpb else 2
    if len(choices) < least:
        raise UserError(
            f"{where}: choices has {len(choices)}; give at least {least}"
            + (", or use format=bpb, which needs only the right one" if choices else "")
        )
    if form is TaskFormat.mc and len(choices) > len(ascii_uppercase):
        raise UserError(f"{where}: choices has {len(choices)}, and format=mc has 26 letters; use format=rc")
    return tuple(choices)


def check_text(value: Any, key: str, where: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {json_type(value)}; give a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON allows a lone "\ud800", UTF-8 does not
        half = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f"{where}: {key} has half a surrogate pair, {half}; give whole characters") from None
