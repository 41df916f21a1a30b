"""Conversations to text: a tokenizer's chat template, rendered as Transformers renders it (5.23; parity in
tests/parity/test_chat_parity.py), and where in the text the assistant speaks.

Templates come with tokenizers from anywhere: jinja2's immutable sandbox renders them, and they see nothing
but the conversation and the special tokens.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from olmoe_train.utils.errors import UserError

ASSISTANT = "assistant"
# Under which a message's reasoning is passed; templates read the first, those of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]
Span = tuple[int, int]
"""Characters [start, end) of a rendered conversation."""


class TemplateError(Exception):
    """A template does not take a conversation; the message says why."""


@dataclass(frozen=True)
class ChatTemplate:
    source: str
    special_tokens: tuple[tuple[str, str], ...]
    """(name, text) of each that the tokenizer has: ("eos_token", "</s>"), ..."""
    date: str | None
    """ISO date of "now" for a template that asks; None: it must not ask."""

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """Raises TemplateError for whatever the template raises."""
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
            "messages": [_as_templates_expect(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            for piece in template.generate(variables):  # not extend(): _Generation reads them meanwhile
                pieces.append(piece)
        except Exception as error:  # a template can raise anything
            raise TemplateError(f"the chat template refuses it: {str(error).rstrip('.')}") from None
        return "".join(pieces)

    def render_conversation(self, messages: list[Message]) -> tuple[str, list[Span] | None]:
        """(text, the assistant's turns in it); None: the template does not let them be told.

        A turn is what the model would have had to write. It begins where the prompt ends that generation
        would be given, and ends with the conversation cut off after it; both must be literal beginnings of
        the whole text. White space that the turn ends with is not part of it: templates put it between turns,
        where it may become one token with what follows. A template that marks the turns itself
        ({% generation %}) is taken at its word. Raises TemplateError.
        """
        marked: list[tuple[int, str]] = []
        text = self._render(messages, False, marked)
        if _marks_turns(self.source):
            # Within a macro the place is not yet known when the turn is rendered.
            known = all(text.startswith(turn, start) for start, turn in marked)
            return text, [(start, start + len(turn)) for start, turn in marked] if known else None
        turns: list[Span] = []
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
            turns.append((len(prompt), max(len(prompt), len(through.rstrip()))))
        return text, turns


def open_template(source: str, special_tokens: dict[str, str], date: str | None, origin: str) -> ChatTemplate:
    """UserError, naming `origin`, for a template that does not parse, or needs a date that is not given."""
    try:
        tree = _environment(None).parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{origin}:{error.lineno}: not a chat template: {error.message}") from None
    if "strftime_now" in jinja2.meta.find_undeclared_variables(tree) and date is None:
        raise UserError(
            f"{origin}: its text depends on the day (strftime_now).\n"
            "  Give one: tokenizer.template_date=YYYY-MM-DD, so that the same command makes the same tokens."
        )
    try:
        datetime.date.fromisoformat(date or "2000-01-01")
    except ValueError as error:
        raise UserError(f"tokenizer.template_date={date}: {error}; write it YYYY-MM-DD") from None
    return ChatTemplate(source, tuple(sorted(special_tokens.items())), date)


def _as_templates_expect(message: Message) -> Message:
    """Without null fields (every row of a table has every field); reasoning under the names it goes by."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: renders what is between, and notes where."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration
    pieces: list[str]
    """What is rendered so far."""
    marked: list[tuple[int, str]]
    """(place in what is rendered so far, contents)"""

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.marked.append((sum(map(len, self.pieces)), text))
        return text


def _environment(date: str | None) -> ImmutableSandboxedEnvironment:
    """The filters, functions and treatment of white space that chat templates are written for."""
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
def _marks_turns(source: str) -> bool:
    tokens: Iterator[tuple[int, str, str]] = _environment(None).lex(source)
    return any(kind == "name" and value == "endgeneration" for _, kind, value in tokens)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not jinja2's, which escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
