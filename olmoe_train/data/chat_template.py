"""Renders conversations with a chat template, and finds the assistant's turns in the rendered text.

The text is the same as that of Transformers 5.23 (test_chat_parity.py compares them).
"""

import datetime
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from olmoe_train.config.keys import config_directory
from olmoe_train.data.jinja_environment import Marks, marks_generation, render, template_environment
from olmoe_train.utils.errors import UserError

ASSISTANT = "assistant"
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of a template that its caller sets. They are no chat_template_kwargs."""
_TEMPLATE_NAME = re.compile(r"[\w-]+")
# Fields in which data sets store a message's reasoning. Most templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Stands for a text part while it is tried out whether a template takes parts. No template has it.
_PROBE = "Zq7probe"

Message = dict[str, Any]
Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""


class TemplateError(Exception):
    """A template rejects a conversation. The message says why."""


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders."""

    messages: list[Message]
    """Each has a role and, in most cases, content: a string, or a list of text parts."""
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant may call."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the template. They override those of the template's settings."""

    def until(self, index: int) -> "Conversation":
        """Return the conversation with its first `index` messages."""
        return replace(self, messages=self.messages[:index])


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation."""

    text: str
    spans: list[Span] | None
    """What the model has to learn to write. None: the template does not allow finding it."""
    empty_turns: int
    """Turns in which the assistant says nothing. They are never part of the spans."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with all that decides its output. It can be sent to another process."""

    source: str
    """Jinja source."""
    special_tokens: tuple[tuple[str, str], ...]
    """(name, text) of each special token of the tokenizer: ("eos_token", "</s>"), ..."""
    date: str | None
    """ISO date that the template sees as today's. None: the template does not ask for it."""
    tool_use_source: str | None = None
    """Jinja source for conversations with tools. None: the same source."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables that the template sees, such as {"enable_thinking": False}."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the output. Fields that were added later are left out if they are not in use."""
        values = asdict(self)
        later = ("tool_use_source", "kwargs")
        return {name: value for name, value in values.items() if value or name not in later}

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Render messages as one text.

        Args:
            messages: Each has a role and content, and may have more fields.
            add_generation_prompt: Append what precedes the assistant's next message.
            tools: JSON schemas of tools.
            kwargs: Further variables for the template.

        Raises:
            TemplateError: The template raised an exception.
        """
        return self._render(Conversation(messages, tools, kwargs or {}), add_generation_prompt)[0]

    def _source(self, conversation: Conversation) -> str:
        return self.source if conversation.tools is None else self.tool_use_source or self.source

    def _render(self, conversation: Conversation, add_generation_prompt: bool = False) -> tuple[str, Marks]:
        variables = {
            **dict(self.special_tokens),
            **self.kwargs,
            **conversation.kwargs,
            "messages": [_normalized(message) for message in conversation.messages],
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render(self._source(conversation), self.date, variables)
        except Exception as error:  # a template can raise anything
            raise TemplateError(f"the chat template refuses it: {str(error).rstrip('.')}") from None

    def with_text_content(self, conversation: Conversation) -> Conversation:
        """Join content that is a list of text parts with spaces, unless the template takes such lists.

        Transformers joins them so for a language model (its server does; apply_chat_template gives every
        list to the template). Whether the template takes lists is tried out: all parts of a probe must
        appear in the rendered text, and not as Python or JSON source.
        """
        if not any(isinstance(message.get("content"), list) for message in conversation.messages):
            return conversation

        def count(of_parts: Any) -> tuple[int, int]:
            messages = [
                {**message, "content": of_parts(len(message["content"]))}
                if isinstance(message.get("content"), list)
                else message
                for message in conversation.messages
            ]
            try:
                text = self._render(replace(conversation, messages=messages))[0]
            except TemplateError:
                return 0, 0
            return text.count(_PROBE), text.count(f"'{_PROBE}'") + text.count(f'"{_PROBE}"')

        taken, quoted = count(lambda parts: [{"type": "text", "text": _PROBE}] * parts)
        if taken >= max(1, count(lambda parts: " ".join([_PROBE] * parts))[0]) and not quoted:
            return conversation
        messages = [
            message if message.get("content") is None else {**message, "content": joined_content(message)}
            for message in conversation.messages
        ]
        return replace(conversation, messages=messages)

    def render_conversation(self, conversation: Conversation, turns: list[int] | None = None) -> Rendered:
        """Render a conversation and find what the model has to learn to write in it.

        The span of an assistant message starts where the generation prompt before it ends, and ends where the
        conversation would end if it stopped after that message. Both of these shorter renderings must be
        literal prefixes of the whole text. White space at the end of a span is not part of it: templates put
        it between messages, where it may merge into one token with what follows. If the template marks the
        spans itself ({% generation %}), its marks are used instead, without what the generation prompt has
        of them.

        Args:
            conversation: Its messages, tools and variables.
            turns: Indices of the assistant's messages to learn. None: all of them.

        Raises:
            TemplateError: The template raised an exception.
        """
        turns = assistant_turns(conversation.messages) if turns is None else turns
        text, marks = self._render(conversation)
        if marks_generation(self._source(conversation)):
            return self._marked_turns(conversation, turns, text, marks)
        spans: list[Span] = []
        empty, proven = 0, True
        for index in turns:
            try:
                prompt, through = self._around(conversation, index)
            except TemplateError:
                proven = False
                continue
            if self._is_silent(conversation, index, prompt, through):
                empty += 1
                continue
            proven = proven and through.startswith(prompt) and text.startswith(through)
            spans.append((len(prompt), max(len(prompt), len(through.rstrip()))))
        return Rendered(text, spans if proven else None, empty)

    def expand(self, conversation: Conversation, turns: list[int]) -> list[Rendered]:
        """Render the conversation once for each of the turns, cut off after it, with this turn to learn.

        Empty turns are left out.

        Raises:
            TemplateError: The template raised an exception.
        """
        found = [self.render_conversation(conversation.until(index + 1), [index]) for index in turns]
        return [rendered for rendered in found if not rendered.empty_turns]

    def _around(self, conversation: Conversation, index: int) -> tuple[str, str]:
        """Return (the prompt of message `index`, the conversation that ends with it)."""
        prompt, _ = self._render(conversation.until(index), add_generation_prompt=True)
        return prompt, self._render(conversation.until(index + 1))[0]

    def _is_silent(self, conversation: Conversation, index: int, prompt: str, through: str) -> bool:
        """Return whether nothing of the assistant's message `index` is rendered, white space aside."""
        message = conversation.messages[index]
        said = joined_content(message).strip()
        if said and said in through[len(prompt) :]:
            return False
        before = conversation.until(index).messages
        silent = {"role": ASSISTANT, "content": ""}
        try:
            if not said:
                blank = [*before, {**message, "content": ""}]
                through, _ = self._render(replace(conversation, messages=blank))
            nothing, _ = self._render(replace(conversation, messages=[*before, silent]))
        except TemplateError:
            return not said and message.keys() <= silent.keys()
        return through == nothing

    def _marked_turns(
        self, conversation: Conversation, turns: list[int], text: str, marks: Marks
    ) -> Rendered:
        """Find the turns by the {% generation %} blocks of the rendered conversation.

        A block belongs to the message with which it appears when the conversation grows by one message at a
        time.
        """
        # Inside a macro the position is unknown while the message is rendered; then the marks are wrong.
        if not all(text.startswith(content, start) for start, content in marks):
            return Rendered(text, None, 0)
        spans: list[Span] = []
        empty = known = 0
        all_turns = assistant_turns(conversation.messages)
        try:
            for index in all_turns:
                prompt, before = self._render(conversation.until(index), add_generation_prompt=True)
                through, after = self._render(conversation.until(index + 1))
                if len(before) != known:
                    raise TemplateError("a block belongs to no message of the assistant")
                known = len(after)
                if index in turns and self._is_silent(conversation, index, prompt, through):
                    empty += 1
                elif index in turns:
                    inserted = len(prompt) if text.startswith(prompt) else 0
                    ends = [(start, start + len(content)) for start, content in marks[len(before) : known]]
                    spans += [(max(start, inserted), end) for start, end in ends if end > inserted]
            if known != len(marks):
                raise TemplateError("a block belongs to no message of the assistant")
        except TemplateError:
            # Which block belongs to which message is unknown. If all are learnt, it does not matter.
            blank = any(not joined_content(conversation.messages[index]).strip() for index in all_turns)
            if blank or turns != all_turns:
                return Rendered(text, None, empty)
            return Rendered(text, [(start, start + len(content)) for start, content in marks], 0)
        return Rendered(text, spans, empty)


def assistant_turns(messages: list[Message]) -> list[int]:
    """Return the indices of the assistant's messages."""
    return [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]


def joined_content(message: Message) -> str:
    """Return the content of a message as one text. A message without content gives an empty one."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part["text"] for part in content)


def read_template(name_or_path: str) -> str:
    """Read the Jinja source that tokenizer.chat_template names.

    Args:
        name_or_path: A file, or the name of a template in configs/chat_templates/, such as tulu. If there
            is a file of that name, it is read.

    Raises:
        UserError: There is neither, or the file cannot be read as UTF-8.
    """
    path = Path(name_or_path).expanduser()
    included = {file.stem: file for file in (config_directory() / "chat_templates").glob("*.jinja")}
    if not path.is_file() and _TEMPLATE_NAME.fullmatch(name_or_path):
        if name_or_path not in included:
            raise UserError(
                f"tokenizer.chat_template={name_or_path}: no such file, and no template of that name.\n"
                f"  Give a file, or one of: {', '.join(sorted(included))}."
            )
        path = included[name_or_path]
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template={name_or_path}: {error}") from error


def open_template(
    source: str,
    special_tokens: dict[str, str],
    date: str | None,
    origin: str,
    tool_use_source: str | None = None,
    kwargs: dict[str, Any] | None = None,
    kwargs_key: str = "tokenizer.chat_template_kwargs",
) -> ChatTemplate:
    """Check a template and make it ready to render.

    Args:
        source: Jinja source.
        special_tokens: Name -> text of the tokenizer's special tokens.
        date: Today's date for templates that ask for it, YYYY-MM-DD.
        origin: Where the template comes from, for error messages.
        tool_use_source: Jinja source for conversations with tools. None: `source`.
        kwargs: Further variables for the template.
        kwargs_key: Key of the configuration that `kwargs` come from, for error messages.

    Raises:
        UserError: The template does not parse, or asks for a date that is missing or malformed; or a variable
            has the name of one that the template gets anyway.
    """
    variables: set[str] = set()
    for text in filter(None, (source, tool_use_source)):
        try:
            variables |= jinja2.meta.find_undeclared_variables(template_environment(None).parse(text))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{origin}:{error.lineno}: not a chat template: {error.message}") from None
    kwargs = kwargs or {}
    if reserved := [name for name in RESERVED if name in kwargs]:
        raise UserError(f"{kwargs_key}: {', '.join(reserved)} is set for each conversation; remove it")
    if unknown := [name for name in kwargs if name not in variables | special_tokens.keys()]:
        provided = {*RESERVED, *special_tokens, *template_environment("2000-01-01").globals}
        known = ", ".join(sorted(variables - provided))
        raise UserError(
            f"{kwargs_key}.{unknown[0]}: {origin} does not read this variable.\n  It reads {known or 'none'}."
        )
    if "strftime_now" in variables and date is None:
        raise UserError(
            f"{origin}: its text depends on the day (strftime_now).\n"
            "  Set tokenizer.template_date=YYYY-MM-DD, so that the same command always gives the same tokens."
        )
    try:
        datetime.date.fromisoformat(date or "2000-01-01")
    except ValueError as error:
        raise UserError(f"tokenizer.template_date={date}: {error}; write it as YYYY-MM-DD") from None
    return ChatTemplate(source, tuple(sorted(special_tokens.items())), date, tool_use_source, kwargs)


def _normalized(message: Message) -> Message:
    """Drop null fields (in a table every row has every field), and copy the reasoning to both its names."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
