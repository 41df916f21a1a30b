"""How the configuration says records are read, and which records are kept."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from olmoe_train.config.choices import LearnedTurns, Records, Truncate, Turns
from olmoe_train.config.data import SourceConfig
from olmoe_train.data.chat_template import ChatTemplate
from olmoe_train.utils.errors import UserError


class Filtered(Enum):
    """Marks a record that a filter leaves out. Such a record is not a bad one."""

    FILTERED = "filtered"


@dataclass(frozen=True)
class RecordSpec:
    """What a record must look like, and how it becomes a document. Sent to the worker processes."""

    records: Records
    content_fields: tuple[str, ...]
    """Fields with the content: the text, the messages, the prompt and the completion, or the question and the
    answer."""
    id_field: str | None
    """Field that identifies a document. None: its file and line do."""
    max_record_bytes: int
    """A longer record is a bad one."""
    keep: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """Filters: (dotted field name, values that are kept)."""
    min_characters: int = 0
    max_characters: int | None = None
    template: ChatTemplate | None = None
    """Renders conversations."""
    learn: LearnedTurns = LearnedTurns.all
    turns: Turns = Turns.together
    input_field: str | None = None
    """Of an alpaca record: the field that the question is about. Records may lack it."""
    tools_field: str | None = None
    template_kwargs_field: str | None = None
    prompt_field: str | None = None
    """Of a pair: the field with the prompt. Records may lack it."""
    truncate: Truncate = Truncate.drop
    sequence_length: int = 0
    """Of preferences: greatest number of tokens of a prompt with its completion."""
    excerpt_bytes: int = 1000
    """Bytes that are kept of a record longer than max_record_bytes: enough to recognize it."""

    @classmethod
    def from_config(
        cls, source: SourceConfig, template: ChatTemplate | None, sequence_length: int = 0
    ) -> "RecordSpec":
        """Build the specification from data.source. `template` renders conversations."""
        chats = source.records in (*CONVERSATIONS, *PREFERENCES)
        return cls(
            source.records,
            content_fields(source),
            source.id_field,
            source.max_record_bytes,
            tuple((item.field, tuple(item.values)) for item in source.keep),
            source.min_characters,
            source.max_characters,
            template,
            source.learn,
            source.turns,
            source.input_field if source.records is Records.alpaca else None,
            source.tools_field if chats else None,
            source.template_kwargs_field if chats else None,
            source.prompt_field if source.records is Records.preference else None,
            source.truncate,
            sequence_length,
        )

    @property
    def optional_fields(self) -> set[str]:
        """Fields of the content that a record may lack."""
        extra = {Records.sharegpt: ("system",), Records.alpaca: ("system", "history")}.get(self.records, ())
        named = (self.input_field, self.tools_field, self.template_kwargs_field, self.prompt_field)
        return {*extra, *(field for field in named if field is not None)}

    def columns(self, where: str, names: list[str]) -> list[str]:
        """Select the columns of a table that have to be read.

        Args:
            where: Name of the table, for the error message.
            names: Its columns.

        Raises:
            UserError: A column that is needed is missing.
        """
        wanted = {field: self.key_of(field) for field in self.content_fields}
        wanted |= {_column(field, names): "data.source.keep" for field, _ in self.keep}
        for column, key in wanted.items():
            if column not in names:
                raise UserError(
                    f"{where}: no column {column!r}; it has {', '.join(names)}.\n"
                    f"  Set {key} to one of these{_or_records(names)}."
                )
        others = {self.id_field, *self.optional_fields}
        return [name for name in names if name in wanted or name in others]

    def key_of(self, content_field: str) -> str:
        """Return the configuration key that names a content field."""
        return f"data.source.{CONTENT_KEYS[self.records][self.content_fields.index(content_field)]}_field"

    def keeps(self, record: dict[str, Any]) -> bool:
        """Return whether the record passes the filters of data.source.keep."""
        return all(_is_one_of(lookup(record, field), values) for field, values in self.keep)

    def keeps_length(self, characters: int) -> bool:
        """Return whether a text of this length passes min_characters and max_characters."""
        longest = self.max_characters
        return self.min_characters <= characters and (longest is None or characters <= longest)


# Kind of record -> the content's names; data.source.NAME_field is the key for each.
CONTENT_KEYS = {
    Records.text: ("text",),
    Records.messages: ("messages",),
    Records.sharegpt: ("conversations",),
    Records.alpaca: ("instruction", "output"),
    Records.preference: ("chosen", "rejected"),
    Records.unpaired_preference: ("prompt", "completion", "label"),
    Records.prompt_completion: ("prompt", "completion"),
}


CONVERSATIONS = (Records.messages, Records.sharegpt, Records.alpaca)
"""Records that a chat template renders."""
PREFERENCES = (Records.preference, Records.unpaired_preference)
"""Records of objective=preference. A chat template renders those that are conversations."""


def content_fields(source: SourceConfig) -> tuple[str, ...]:
    """Return the names of the fields with a record's content."""
    return tuple(getattr(source, f"{key}_field") for key in CONTENT_KEYS[source.records])


def lookup(record: dict[str, Any], field: str) -> Any:
    """Return a field by its name or by a dotted path into nested objects. None if there is no such field."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value


def _or_records(names: list[str]) -> str:
    """Name the form of records that has columns of these names, if there is one."""
    form = next((form.value for form, keys in CONTENT_KEYS.items() if set(keys) <= set(names)), None)
    return f", or data.source.records={form}" if form else ""


def _column(field: str, names: list[str]) -> str:
    return field if field in names else field.split(".")[0]


def _is_one_of(value: Any, kept: tuple[Any, ...]) -> bool:
    # In Python True == 1, in JSON they differ.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in kept)
