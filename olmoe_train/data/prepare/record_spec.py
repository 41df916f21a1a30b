"""What of the configuration decides how a record is read, and which records are wanted."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from olmoe_train.config.choices import Records
from olmoe_train.config.data import SourceConfig
from olmoe_train.data.chat_template import ChatTemplate
from olmoe_train.utils.errors import UserError


class Filtered(Enum):
    """A record that a filter leaves out; not a bad one."""

    FILTERED = "filtered"


@dataclass(frozen=True)
class Reading:
    records: Records
    content_fields: tuple[str, ...]
    """The fields that `records` is about: text, messages, or prompt and completion."""
    id_field: str | None
    max_record_bytes: int
    keep: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """(dotted field, the values that are kept)"""
    min_characters: int = 0
    max_characters: int | None = None
    template: ChatTemplate | None = None
    """Renders messages."""

    @classmethod
    def of(cls, source: SourceConfig, template: ChatTemplate | None) -> "Reading":
        return cls(
            source.records,
            content_fields(source),
            source.id_field,
            source.max_record_bytes,
            tuple((one.field, tuple(one.values)) for one in source.keep),
            source.min_characters,
            source.max_characters,
            template,
        )

    def columns(self, where: str, names: list[str]) -> list[str]:
        """Which of a table's columns to read. UserError for one that there must be and is not."""
        wanted = {field: self.key_of(field) for field in self.content_fields}
        wanted |= {_column(field, names): "data.source.keep" for field, _ in self.keep}
        for column, key in wanted.items():
            if column not in names:
                raise UserError(
                    f"{where}: no column {column!r}; it has {', '.join(names)}.\n  Say which one in {key}."
                )
        return [name for name in names if name in wanted or name == self.id_field]

    def key_of(self, content_field: str) -> str:
        """The configuration key that names it."""
        return f"data.source.{CONTENT_KEYS[self.records][self.content_fields.index(content_field)]}_field"

    def wants(self, record: dict[str, Any]) -> bool:
        """Whether its fields have values that are kept."""
        return all(_is_one_of(lookup(record, field), values) for field, values in self.keep)

    def wants_length(self, characters: int) -> bool:
        most = self.max_characters
        return self.min_characters <= characters and (most is None or characters <= most)


CONTENT_KEYS = {
    Records.text: ("text",),
    Records.messages: ("messages",),
    Records.prompt_completion: ("prompt", "completion"),
}


def content_fields(source: SourceConfig) -> tuple[str, ...]:
    return tuple(getattr(source, f"{key}_field") for key in CONTENT_KEYS[source.records])


def lookup(record: dict[str, Any], field: str) -> Any:
    """A field by its name, or by the names of objects within objects; None where there is none."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return value


def _column(field: str, names: list[str]) -> str:
    return field if field in names else field.split(".")[0]


def _is_one_of(value: Any, kept: tuple[Any, ...]) -> bool:
    # For Python, True == 1.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in kept)
