"""Reads task files: a card in YAML that says what a task is, and its questions as JSON lines.

docs/reference/task-files.md describes both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeVar

from olmoe_train.evaluation.tasks.records import Record, read_records
from olmoe_train.evaluation.tasks.task import ACCURACIES, Question, Task, TaskFormat, TaskMetric
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.yaml_files import read_yaml_mapping

_KEYS = {
    "name": str,
    "data": str,
    "format": str,
    "metric": str,
    "shots": int,
    "examples": str,
    "prompt": str,
    "separator": str,
    "description": str,
    "source": str,
    "license": str,
}
_QUERY = "{query}"
_METRICS = {
    TaskFormat.rc: TaskMetric.acc_per_char,
    TaskFormat.mc: TaskMetric.acc,
    TaskFormat.bpb: TaskMetric.bits_per_byte,
}
_Choice = TypeVar("_Choice", bound=Enum)


@dataclass(frozen=True)
class TaskCard:
    """What a task file says about its task."""

    name: str
    data: Path
    """The questions: JSON lines, also with .gz or .zst."""
    format: TaskFormat
    metric: TaskMetric
    shots: int
    """Examples with their answers before each question."""
    examples: Path | None
    """JSON lines with the examples; None: no shots."""
    prompt: str
    """Surrounds the query of a record. Has {query} once."""
    separator: str
    """Between description, examples and question."""
    description: str
    """Text before the examples. Empty: none."""
    source: str
    """Where the data comes from, for people."""
    license: str
    """License of the data, for people."""


def read_card(path: Path, form: TaskFormat | None = None) -> TaskCard:
    """Read the card of a task.

    Args:
        path: The YAML file.
        form: Replaces the card's format, appends `_FORMAT` to the name, and takes the metric of the format.

    Raises:
        UserError: The card cannot be read, or a key is wrong. The message names file and key.
    """
    values = _values(path)
    own = _member(path, "format", values.get("format", TaskFormat.rc.name), TaskFormat)
    name = values.get("name", path.stem)
    if form is None:
        metric = _member(path, "metric", values.get("metric", _METRICS[own].name), TaskMetric)
        if own is TaskFormat.bpb and metric in ACCURACIES:
            raise UserError(
                f"{path}: metric={metric.name}: needs all choices, and format=bpb has only the right one; "
                "set metric to bits_per_byte or ce, or format to rc"
            )
    else:
        name, metric = f"{name}_{form.name}", _METRICS[form]
    prompt = values.get("prompt", f"Question: {_QUERY}\nAnswer:")
    if prompt.count(_QUERY) != 1:
        raise UserError(f"{path}: prompt={prompt!r}: must have {_QUERY} exactly once")
    data = path.parent / Path(values.get("data", f"{path.stem}.jsonl")).expanduser()
    return TaskCard(
        name=name,
        data=data,
        format=form or own,
        metric=metric,
        shots=values.get("shots", 0),
        examples=_examples(path, values, data),
        prompt=prompt,
        separator=values.get("separator", "\n\n"),
        description=values.get("description", ""),
        source=values.get("source", ""),
        license=values.get("license", ""),
    )


def read_task_file(path: Path, form: TaskFormat | None = None) -> Task:
    """Read a task: its card, its examples and its questions.

    Args:
        path: The card.
        form: Replaces the card's format (read_card).

    Raises:
        UserError: A file cannot be read, a key of the card is wrong, or a record. The message names file and
            key, or file:line.
    """
    card = read_card(path, form)
    before = _before(path, card)
    questions = tuple(_question(record, card, before) for record in _records(path, "data", card.data, card))
    return Task(card.name, questions, card.metric, card.format, joint=True)


def _values(path: Path) -> dict[str, Any]:
    """The keys of a card, known and of the right type."""
    card = read_yaml_mapping(path, "a task file has keys, such as format: rc")
    for key, value in card.items():
        if key not in _KEYS:
            raise UserError(f"{path}: {key}: there is no such key; a task file has {', '.join(_KEYS)}")
        if type(value) is not _KEYS[key]:  # true is an int to isinstance
            kind = "an integer" if _KEYS[key] is int else "a string; put it in quotes"
            raise UserError(f"{path}: {key}={value}: must be {kind}")
    return card


def _member(path: Path, key: str, name: str, kind: type[_Choice]) -> _Choice:
    if name not in kind.__members__:
        raise UserError(f"{path}: {key}={name}: must be one of {', '.join(kind.__members__)}")
    return kind[name]


def _examples(path: Path, values: dict[str, Any], data: Path) -> Path | None:
    """The file with the examples; None: shots is 0."""
    shots = values.get("shots", 0)
    if shots < 0:
        raise UserError(f"{path}: shots={shots}: must not be negative")
    if not shots:
        return None
    if "examples" not in values:
        raise UserError(f"{path}: shots={shots}: needs examples, a JSONL file with the examples to show")
    examples = path.parent / Path(values["examples"]).expanduser()
    if examples.resolve() == data.resolve():
        raise UserError(
            f"{path}: examples={values['examples']}: is the file with the questions; give the examples a "
            "file of their own, or the prompts have the answers in them"
        )
    return examples


def _records(path: Path, key: str, file: Path, card: TaskCard) -> Iterator[Record]:
    """The records of one of the two files that a card names."""
    if not file.is_file():
        raise UserError(f"{path}: {key}={file}: there is no such file; a relative path starts at the card")
    return read_records(file, card.format)


def _before(path: Path, card: TaskCard) -> str:
    """What precedes each question: the description and the examples."""
    parts = [card.description] if card.description else []
    if card.examples is not None:
        shown = list(_records(path, "examples", card.examples, card))[: card.shots]
        if len(shown) < card.shots:
            raise UserError(f"{path}: shots={card.shots}: {card.examples} has only {len(shown)} examples")
        for record in shown:
            context = _context(record, card)
            parts.append(context + _choices(record, card, context)[record.gold])
    return "".join(part + card.separator for part in parts)


def _question(record: Record, card: TaskCard, before: str) -> Question:
    context = before + _context(record, card)
    choices, gold = _choices(record, card, context), record.gold
    if card.format is TaskFormat.bpb:
        choices, gold = (choices[gold],), 0
    return Question(context, choices, gold, record.asked, record.where)


def _context(record: Record, card: TaskCard) -> str:
    """The question as it is asked, up to where a choice continues it."""
    if record.verbatim:
        return record.asked
    query = record.asked
    if card.format is TaskFormat.mc:
        lines = zip(_letters(record), record.choices, strict=True)
        query += "".join(f"\n {letter}. {choice}" for letter, choice in lines)
    return card.prompt.replace(_QUERY, query)


def _choices(record: Record, card: TaskCard, context: str) -> tuple[str, ...]:
    """What may continue the context, with the space that joins it."""
    choices = _letters(record) if card.format is TaskFormat.mc else record.choices
    if not context or context[-1].isspace():
        return choices
    return tuple(choice if choice[0].isspace() else f" {choice}" for choice in choices)


def _letters(record: Record) -> tuple[str, ...]:
    """A, B, ... for the choices of a record."""
    return tuple(ascii_uppercase[: len(record.choices)])
