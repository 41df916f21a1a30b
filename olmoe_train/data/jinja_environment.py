"""The Jinja that chat templates are written for: sandbox, filters, functions, and {% generation %} blocks.

Templates come from untrusted sources: jinja2's immutable sandbox renders them, and they see only the
conversation and the special tokens.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Marks = list[tuple[int, str]]
"""(start in the rendered text, contents) of each {% generation %} block."""


def render(source: str, date: str | None, variables: dict[str, Any]) -> tuple[str, Marks]:
    """Render a template.

    Args:
        source: Jinja source.
        date: ISO date that the template sees as today's. None: it does not ask for it.
        variables: What the template sees.

    Returns:
        (text, its {% generation %} blocks).

    Raises:
        Exception: Whatever the template raises.
    """
    template = _compiled(source, date)
    tracker = template.environment.extensions[_Generation.identifier]
    assert isinstance(tracker, _Generation)
    pieces: list[str] = []
    tracker.pieces, tracker.marked = pieces, []
    for piece in template.generate(variables):  # not extend(): _Generation reads `pieces` meanwhile
        pieces.append(piece)
    return "".join(pieces), tracker.marked


@lru_cache(maxsize=8)
def marks_generation(source: str) -> bool:
    """Return whether a template marks what the assistant writes with {% generation %}."""
    tokens: Iterator[tuple[int, str, str]] = template_environment(None).lex(source)
    return any(kind == "name" and value == "endgeneration" for _, kind, value in tokens)


def template_environment(date: str | None) -> ImmutableSandboxedEnvironment:
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
    return template_environment(date).from_string(source)


class _Generation(jinja2.ext.Extension):
    """The block {% generation %} ... {% endgeneration %}: renders its contents and records their position."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration
    pieces: list[str]
    """The text rendered so far, in pieces."""
    marked: Marks

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.marked.append((sum(map(len, self.pieces)), text))
        return text


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
