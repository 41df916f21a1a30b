"""Reads conversations out of records: messages, ShareGPT and Alpaca. Says which form a record would fit.

All three become messages as Transformers' chat templates take them. Fields of a message that are not known
here reach the template as they are.
"""

import json
from collections.abc import Callable
from typing import Any

from olmoe_train.config.choices import Records
from olmoe_train.data.chat_template import ASSISTANT, RESERVED, Conversation, Message
from olmoe_train.data.prepare.record_spec import CONTENT_KEYS, PREFERENCES, RecordSpec

# The names that data sets in the form of ShareGPT use (FastChat, LLaMA-Factory, axolotl, Unsloth).
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "function_call": ASSISTANT,
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class FormError(Exception):
    """A record does not have the form that data.source.records names. The message says why."""


def conversation_of(record: dict[str, Any], spec: RecordSpec) -> Conversation:
    """Read the conversation of a record. Its content fields are there.

    Raises:
        FormError: It is none.
    """
    read = {Records.messages: _from_messages, Records.sharegpt: _from_sharegpt, Records.alpaca: _from_alpaca}
    messages = read[spec.records](record, spec)
    return Conversation(messages, *conversation_extras(record, spec))


def conversation_extras(
    record: dict[str, Any], spec: RecordSpec
) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """Return (tools, variables for the chat template) of a record.

    Raises:
        FormError: They are malformed.
    """
    return _tools(record, spec), _kwargs(record, spec)


def json_type(value: Any) -> str:
    """Name the JSON type of a value."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def without_nulls(value: Any) -> Any:
    """Drop the null fields of all objects in a value: in a table, every object has every field."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def fitting_form(record: dict[str, Any], spec: RecordSpec) -> str:
    """Return "; it fits data.source.records=..." with the settings that read the record. Empty: none does."""
    if spec.records in PREFERENCES and all(field in record for field in spec.content_fields):
        return ""  # The sides of a pair are conversations, too, but read as such they are no preference.

    def settings(records: Records, **fields: str) -> str:
        others = [f"data.source.{key}={name}" for key, name in fields.items() if f"{name}_field" != key]
        return " ".join([f"data.source.records={records.value}", *others])

    found: list[tuple[Records, tuple[str, ...], str]] = []
    for name, value in record.items():
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and "role" in first:
            found.append((Records.messages, (name,), settings(Records.messages, messages_field=name)))
        elif isinstance(first, dict) and {"from", "value"} <= first.keys():
            found.append((Records.sharegpt, (name,), settings(Records.sharegpt, conversations_field=name)))
    if {"chosen", "rejected"} <= record.keys():
        found.insert(0, (Records.preference, ("chosen", "rejected"), settings(Records.preference)))
    if isinstance(record.get("label"), bool) and {"prompt", "completion"} <= record.keys():
        names = CONTENT_KEYS[Records.unpaired_preference]
        found.insert(0, (Records.unpaired_preference, names, settings(Records.unpaired_preference)))
    for records in (Records.alpaca, Records.prompt_completion, Records.text):
        names = CONTENT_KEYS[records]
        if all(isinstance(record.get(name), str) for name in names):
            found.append((records, names, settings(records)))
    others = [
        text for records, names, text in found if (records, names) != (spec.records, spec.content_fields)
    ]
    return f"; it fits {others[0]}" if others else ""


def _from_messages(record: dict[str, Any], spec: RecordSpec) -> list[Message]:
    field = spec.content_fields[0]
    return messages_of(record[field], field)


def messages_of(value: Any, field: str) -> list[Message]:
    """Return the value of a field that has to be a list of messages.

    Raises:
        FormError: It is none.
    """
    messages = _list(value, field)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise FormError(f"message {number} is a JSON {json_type(message)}, not an object")
        _check_message(message, number)
    return messages


def _check_message(message: Message, number: int) -> None:
    """Check that a message has a role and a content. The assistant's content may be missing or null."""
    if "role" not in message:
        raise FormError(f"message {number} has no 'role'")
    role, content = message["role"], message.get("content")
    if not isinstance(role, str):
        raise FormError(f"the 'role' of message {number} is a JSON {json_type(role)}, not a string")
    if content is None and role == ASSISTANT:
        _check_tool_calls(message, number)
        return
    if "content" not in message:
        raise FormError(f"message {number} has no 'content'")
    if isinstance(content, list):
        _check_parts(content, number)
    elif not isinstance(content, str):
        kind = json_type(content)
        raise FormError(
            f"the 'content' of message {number} is a JSON {kind}, not a string or a list of parts"
        )
    _check_tool_calls(message, number)


def _check_parts(parts: list[Any], number: int) -> None:
    for place, part in enumerate(parts, start=1):
        where = f"part {place} of the 'content' of message {number}"
        if not isinstance(part, dict):
            raise FormError(f"{where} is a JSON {json_type(part)}, not an object")
        if (kind := part.get("type")) != "text":
            raise FormError(f"{where} has the type {kind!r}, but only parts of the type 'text' can be learnt")
        if not isinstance(part.get("text"), str):
            raise FormError(f"the 'text' of {where} is a JSON {json_type(part.get('text'))}, not a string")


def _check_tool_calls(message: Message, number: int) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise FormError(f"the 'tool_calls' of message {number} is a JSON {json_type(calls)}, not a list")
    for place, call in enumerate(calls, start=1):
        if not isinstance(call, dict):
            kind = json_type(call)
            raise FormError(f"tool call {place} of message {number} is a JSON {kind}, not an object")


def _from_sharegpt(record: dict[str, Any], spec: RecordSpec) -> list[Message]:
    field = spec.content_fields[0]
    messages: list[Message] = []
    for number, turn in enumerate(_list(record[field], field), start=1):
        if not isinstance(turn, dict):
            raise FormError(f"message {number} is a JSON {json_type(turn)}, not an object")
        for name in ("from", "value"):
            if name not in turn:
                raise FormError(f"message {number} has no {name!r}")
        sender, value = turn["from"], turn["value"]
        role = _SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise FormError(f"message {number} is from {sender!r}; known are {known}")
        others = {name: item for name, item in turn.items() if name not in ("from", "value")}
        if sender == "function_call":
            message = {"role": role, "content": None, "tool_calls": _called(value, number), **others}
        elif not isinstance(value, str):
            raise FormError(f"the 'value' of message {number} is a JSON {json_type(value)}, not a string")
        else:
            message = {"role": role, "content": value, **others}
        messages.append(message)
    return [*_system(record), *messages]


def _called(value: Any, number: int) -> list[dict[str, Any]]:
    """Read the value of a function_call: a JSON object with name and arguments, or a list of them."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise FormError(
            f'the \'value\' of message {number} is not a function call: {{"name": ..., "arguments": ...}} as '
            "JSON, or a list of them"
        )
    return [{"type": "function", "function": call} for call in calls]


def _from_alpaca(record: dict[str, Any], spec: RecordSpec) -> list[Message]:
    instruction, output = spec.content_fields
    question, answer = string_of(record[instruction], instruction), string_of(record[output], output)
    if spec.input_field is not None and record.get(spec.input_field) is not None:
        about = string_of(record[spec.input_field], spec.input_field)
        question = "\n\n".join(text for text in (question, about) if text)
    messages = _system(record)
    for place, pair in enumerate(record.get("history") or [], start=1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise FormError(f"entry {place} of its 'history' is not a list of a question and an answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": ASSISTANT, "content": pair[1]}]
    return [*messages, {"role": "user", "content": question}, {"role": ASSISTANT, "content": answer}]


def string_of(value: Any, field: str) -> str:
    """Return the value of a field that has to be a string.

    Raises:
        FormError: It is none.
    """
    if not isinstance(value, str):
        raise FormError(f"its {field!r} is a JSON {json_type(value)}, not a string")
    return value


def _system(record: dict[str, Any]) -> list[Message]:
    """Return the system message that is a field of the record, if there is one."""
    system = string_of(record.get("system") or "", "system")
    return [{"role": "system", "content": system}] if system else []


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormError(f"its {field!r} is a JSON {json_type(value)}, not a list")
    if not value:
        raise FormError(f"its {field!r} has no message")
    return value


def _tools(record: dict[str, Any], spec: RecordSpec) -> list[dict[str, Any]] | None:
    field = spec.tools_field
    tools = _decoded(record, field, lambda value: isinstance(value, list), "list")
    for place, tool in enumerate(tools or [], start=1):
        if not isinstance(tool, dict):
            raise FormError(f"tool {place} of its {field!r} is a JSON {json_type(tool)}, not an object")
    return tools


def _kwargs(record: dict[str, Any], spec: RecordSpec) -> dict[str, Any]:
    field = spec.template_kwargs_field
    kwargs = _decoded(record, field, lambda value: isinstance(value, dict), "object") or {}
    if reserved := [name for name in RESERVED if name in kwargs]:
        raise FormError(f"its {field!r} has {reserved[0]!r}, which is not a variable to set")
    return kwargs


def _decoded(record: dict[str, Any], field: str | None, accepts: Callable[[Any], bool], kind: str) -> Any:
    """Return an optional field, decoded if it is JSON in a string. None: the record does not have it."""
    value = record.get(field) if field is not None else None
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise FormError(f"its {field!r} is a string that is not JSON") from None
    if value is None or value == "":
        return None
    if not accepts(value):
        raise FormError(f"its {field!r} is a JSON {json_type(value)}, not a JSON {kind}")
    return value
