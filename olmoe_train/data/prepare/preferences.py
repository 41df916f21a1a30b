"""Reads preferences out of records: two completions of one prompt, or a completion with a label.

The forms are those of TRL and open-instruct: texts, or conversations with or without a separate prompt.
"""

from dataclasses import dataclass
from typing import Any

from olmoe_train.config.choices import LearnedTurns, Records
from olmoe_train.data.chat_template import (
    ASSISTANT,
    ChatTemplate,
    Conversation,
    Message,
    Span,
    TemplateError,
    assistant_turns,
    joined_content,
)
from olmoe_train.data.prepare.record_forms import (
    FormError,
    conversation_extras,
    json_type,
    messages_of,
    string_of,
)
from olmoe_train.data.prepare.record_spec import RecordSpec


@dataclass(frozen=True)
class Side:
    """A prompt with one completion."""

    text: str
    prompt_end: int
    """Character at which the completion begins."""
    spans: list[Span] | None
    """Characters [start, end) that are compared. None: the chat template does not allow finding them."""
    label: int
    """1: chosen or wanted; 0: rejected or unwanted."""
    is_text: bool
    """Whether prompt and completion are plain text, without a chat template."""


def preference_of(record: dict[str, Any], spec: RecordSpec) -> list[Side]:
    """Read a record: the chosen and the rejected side, or one side of records=unpaired_preference.

    Raises:
        FormError: The record is none; the message says why.
    """
    if spec.records is Records.unpaired_preference:
        return [_labelled(record, spec)]
    names = spec.content_fields
    values = [record[name] for name in names]
    if values[0] == values[1]:
        raise FormError(f"its {names[0]!r} and {names[1]!r} are equal")
    prompt = record.get(spec.prompt_field) if spec.prompt_field is not None else None
    if all(isinstance(value, str) for value in values):
        return _of_texts(prompt, values, spec)
    if all(isinstance(value, list) for value in values):
        chosen, rejected = _of_conversations(prompt, values, record, spec)
        if chosen.text == rejected.text:  # a chat template may strip white space or ignore a key
            raise FormError(f"its {names[0]!r} and {names[1]!r} are equal once they are rendered")
        return [chosen, rejected]
    kinds = [f"{name!r} is a JSON {json_type(value)}" for name, value in zip(names, values, strict=True)]
    raise FormError(f"its {kinds[0]} and its {kinds[1]}; both must be strings, or lists of messages")


def _labelled(record: dict[str, Any], spec: RecordSpec) -> Side:
    prompt_name, completion_name, label_name = spec.content_fields
    prompt, completion, label = (record[name] for name in spec.content_fields)
    if label not in (0, 1):  # True and False, too
        raise FormError(f"its {label_name!r} is {label!r}, not true or false")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _text_side(prompt, completion, int(label), prompt_name, completion_name, spec)
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = _messages(prompt, prompt_name) + _messages(completion, completion_name)
        return _rendered(messages, len(prompt), int(label), completion_name, record, spec)
    raise FormError(
        f"its {prompt_name!r} is a JSON {json_type(prompt)} and its {completion_name!r} a JSON "
        f"{json_type(completion)}; both must be strings, or lists of messages"
    )


# --- texts --------------------------------------------------------------------------------------------------


def _of_texts(prompt: Any, texts: list[str], spec: RecordSpec) -> list[Side]:
    if prompt is None:
        end = _common_beginning(*texts)
        prompt, texts = texts[0][:end], [text[end:] for text in texts]
        if not prompt.strip():
            names = " and ".join(map(repr, spec.content_fields))
            raise FormError(f"its {names} have no common beginning, which would be the prompt")
    name = spec.prompt_field or ""
    prompt = string_of(prompt, name)
    return [
        _text_side(prompt, text, label, name, field, spec)
        for text, label, field in zip(texts, (1, 0), spec.content_fields, strict=True)
    ]


def _common_beginning(first: str, second: str) -> int:
    """Length of the common beginning of two texts, up to the white space before the word in which they part.

    A tokenizer puts the space before a word into the word's token.
    """
    shorter = min(len(first), len(second))
    end = next((at for at in range(shorter) if first[at] != second[at]), shorter)
    while end > 0 and not first[end - 1].isspace():
        end -= 1
    return max(0, end - 1)


def _text_side(
    prompt: str, completion: str, label: int, prompt_name: str, completion_name: str, spec: RecordSpec
) -> Side:
    if spec.learn is not LearnedTurns.completion:
        raise FormError(
            f"its {completion_name!r} is a string, which has no turns; set data.source.learn=completion"
        )
    if not prompt.strip():
        raise FormError(f"its {prompt_name!r} is empty")
    if not completion.strip():
        raise FormError(f"the completion in its {completion_name!r} is empty")
    text = prompt + completion
    return Side(text, len(prompt), [(len(prompt), len(text))], label, is_text=True)


# --- conversations ------------------------------------------------------------------------------------------


def _of_conversations(
    prompt: Any, sides: list[list[Any]], record: dict[str, Any], spec: RecordSpec
) -> list[Side]:
    names = spec.content_fields
    conversations = [_messages(side, name) for side, name in zip(sides, names, strict=True)]
    start, conversations = _with_prompt(prompt, conversations, spec)
    return [
        _rendered(messages, start, label, name, record, spec)
        for messages, label, name in zip(conversations, (1, 0), names, strict=True)
    ]


def _messages(value: list[Any], field: str) -> list[Message]:
    """Read a list of messages. A record has several lists, so an error names the field."""
    if not value:
        raise FormError(f"its {field!r} has no message")
    try:
        return messages_of(value, field)
    except FormError as error:
        raise FormError(f"{error} (in its {field!r})") from None


def _with_prompt(
    prompt: Any, conversations: list[list[Message]], spec: RecordSpec
) -> tuple[int, list[list[Message]]]:
    """Return (number of messages of the prompt, both conversations with it)."""
    chosen, rejected = conversations
    if isinstance(prompt, list):
        messages = _messages(prompt, str(spec.prompt_field))
        count = len(messages)
        if all(conversation[:count] == messages for conversation in conversations):
            return count, conversations
        return count, [messages + conversation for conversation in conversations]
    shorter = min(len(chosen), len(rejected))
    count = next((at for at in range(shorter) if chosen[at] != rejected[at]), shorter)
    if count == 0 and isinstance(prompt, str) and chosen[0]["role"] == ASSISTANT:
        raise FormError(
            f"its {spec.prompt_field!r} is a JSON string, and its {spec.content_fields[0]!r} is a list of "
            "messages without it; make the prompt a list of messages"
        )
    if count == 0:
        names = " and ".join(map(repr, spec.content_fields))
        raise FormError(f"its {names} have no common prompt: their first messages differ")
    if prompt is not None:
        question = next((joined_content(m) for m in chosen[:count] if m["role"] == "user"), None)
        if string_of(prompt, str(spec.prompt_field)).strip() != (question or "").strip():
            raise FormError(
                f"its {spec.prompt_field!r} is not the first message of the user in both of its conversations"
            )
    return count, conversations


def _rendered(
    messages: list[Message], start: int, label: int, name: str, record: dict[str, Any], spec: RecordSpec
) -> Side:
    """Render a conversation whose completion begins with message `start`."""
    template = _template(name, spec)
    completion = messages[start:]
    if not any(joined_content(message).strip() or message.get("tool_calls") for message in completion):
        raise FormError(f"the completion in its {name!r} is empty")
    if completion[0]["role"] != ASSISTANT:
        raise FormError(
            f"the completion in its {name!r} starts with a message of {completion[0]['role']!r}, not of the "
            "assistant"
        )
    tools, kwargs = conversation_extras(record, spec)
    turns = assistant_turns(messages)
    if spec.learn is LearnedTurns.last:
        turns = turns[-1:]
    elif spec.learn is LearnedTurns.completion:
        turns = [turn for turn in turns if turn >= start]
    try:
        conversation = template.with_text_content(Conversation(messages, tools, kwargs))
        rendered = template.render_conversation(conversation, turns)
        before = conversation.until(start)
        prompt = template.render(before.messages, True, before.tools, before.kwargs)
    except TemplateError as error:
        raise FormError(str(error)) from None
    if turns and rendered.empty_turns == len(turns):
        raise FormError(f"the assistant says nothing in the turns of its {name!r} that are compared")
    proven = rendered.spans and rendered.text.startswith(prompt)
    return Side(rendered.text, len(prompt), rendered.spans if proven else None, label, is_text=False)


def _template(name: str, spec: RecordSpec) -> ChatTemplate:
    if spec.template is None:
        raise FormError(
            f"its {name!r} is a list of messages, and the tokenizer has no chat template; name one, as in "
            "tokenizer.chat_template=tulu"
        )
    return spec.template
