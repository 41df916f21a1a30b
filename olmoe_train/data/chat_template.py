"""Renders conversations with a chat template, and finds the assistant's messages in the rendered text.

The text is the same as that of Transformers 5.23 (test_chat_parity.py compares them). Templates come from
untrusted sources: jinja2's immutable sandbox renders them, and they see only the conversation and the special
tokens.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olmoe_train.config.keys import config_directory
from olmoe_train.utils.errors import UserError

ASSISTANT = "assistant"
_TEMPLATE_NAME = re.compile(r"[\w-]+")
# Fields in which data sets store a message's reasoning. Most templates read the first, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]
Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""


class TemplateError(Exception):
    """A template rejects a conversation. The message says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with all that decides its output. It can be sent to another process."""

    source: str
    """Jinja source."""
    special_tokens: tuple[tuple[str, str], ...]
    """(name, text) of each special token of the tokenizer: ("eos_token", "</s>"), ..."""
    date: str | None
    """ISO date that the template sees as today's. None: the template does not ask for it."""

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Render messages as one text.

        Args:
            messages: Each has a role and content, and may have more fields.
            add_generation_prompt: Append what precedes the assistant's next message.

        Raises:
            TemplateError: The template raised an exception.
        """
        return self._render(messages, add_generation_prompt, [])

    def _render(
        self, messages: list[Message], add_generation_prompt: bool, marked: list[tuple[int, str]]
    ) -> str:
        template = _compiled(self.source, self.date)
        tracker = template.environment.extensions[_Generation.identifier]
        assert isinstance(tracker, _Generation)
        pieces: list[str] = []
        tracker.pieces, tracker.marked = pieces, marked
        variables = {
            **dict(self.special_tokens),
            "messages": [_normalized(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            for piece in template.generate(variables):  # not extend(): _Generation reads `pieces` meanwhile
                pieces.append(piece)
        except Exception as error:  # a template can raise anything
            raise TemplateError(f"the chat template refuses it: {str(error).rstrip('.')}") from None
        return "".join(pieces)

    def render_conversation(self, messages: list[Message]) -> tuple[str, list[Span] | None]:
        """Render a conversation and find what the model has to learn to write in it.

        The span of an assistant message starts where the generation prompt before it ends, and ends where the
        conversation would end if it stopped after that message. Both of these shorter renderings must be
        literal prefixes of the whole text. White space at the end of a span is not part of it: templates put
        it between messages, where it may merge into one token with what follows. If the template marks the
        spans itself ({% generation %}), its marks are used instead.

        Returns:
            (text, assistant_spans). The spans are None if the template does not allow finding them.

        Raises:
            TemplateError: The template raised an exception.
        """
        marked: list[tuple[int, str]] = []
        text = self._render(messages, False, marked)
        if _marks_generation(self.source):
            # Inside a macro the position is unknown while the message is rendered; then the marks are wrong.
            valid = all(text.startswith(content, start) for start, content in marked)
            return text, [(start, start + len(content)) for start, content in marked] if valid else None
        assistant_spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            try:
                prompt = self.render(messages[:index], add_generation_prompt=True)
                through = self.render(messages[: index + 1])
            except TemplateError:
                return text, None
            if not (through.startswith(prompt) and text.startswith(through)):
                return text, None
            assistant_spans.append((len(prompt), max(len(prompt), len(through.rstrip()))))
        return text, assistant_spans


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


def open_template(source: str, special_tokens: dict[str, str], date: str | None, origin: str) -> ChatTemplate:
    """Check a template and make it ready to render.

    Args:
        source: Jinja source.
        special_tokens: Name -> text of the tokenizer's special tokens.
        date: Today's date for templates that ask for it, YYYY-MM-DD.
        origin: Where the template comes from, for error messages.

    Raises:
        UserError: The template does not parse, or asks for a date that is missing or malformed.
    """
    try:
        tree = _environment(None).parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{origin}:{error.lineno}: not a chat template: {error.message}") from None
    if "strftime_now" in jinja2.meta.find_undeclared_variables(tree) and date is None:
        raise UserError(
            f"{origin}: its text depends on the day (strftime_now).\n"
            "  Set tokenizer.template_date=YYYY-MM-DD, so that the same command always gives the same tokens."
        )
    try:
        datetime.date.fromisoformat(date or "2000-01-01")
    except ValueError as error:
        raise UserError(f"tokenizer.template_date={date}: {error}; write it as YYYY-MM-DD") from None
    return ChatTemplate(source, tuple(sorted(special_tokens.items())), date)


def _normalized(message: Message) -> Message:
    """Drop null fields (in a table every row has every field), and copy the reasoning to both its names."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """The block {% generation %} ... {% endgeneration %}: renders its contents and records their position."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration
    pieces: list[str]
    """The text rendered so far, in pieces."""
    marked: list[tuple[int, str]]
    """(start in the rendered text, contents) of each block."""

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.marked.append((sum(map(len, self.pieces)), text))
        return text


def _environment(date: str | None) -> ImmutableSandboxedEnvironment:
    """Set up the filters, functions and white-space rules that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    if date is not None:
        now = datetime.datetime.fromisoformat(date)
        environment.globals["strftime_now"] = now.strftime
    return environment


@lru_cache(maxsize=8)
def _compiled(source: str, date: str | None) -> jinja2.Template:
    return _environment(date).from_string(source)


@lru_cache(maxsize=8)
def _marks_generation(source: str) -> bool:
    tokens: Iterator[tuple[int, str, str]] = _environment(None).lex(source)
    return any(kind == "name" and value == "endgeneration" for _, kind, value in tokens)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialize to JSON as Transformers does. jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
