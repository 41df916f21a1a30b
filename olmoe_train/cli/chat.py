"""Conversations in a terminal, with commands, or through a pipe. Only answers are written to stdout."""

import contextlib
import re
import sys

from olmoe_train.cli.chat_session import ChatSession, Ending
from olmoe_train.utils.errors import UserError

PROMPT = "> "
HELP = """\
/clear   forget the conversation
/help    list the commands
/exit    leave; Ctrl-D does the same
Ctrl-C   stop an answer, of which the text so far is kept; leave, if there is none to stop"""


def converse(session: ChatSession, first: str | None) -> None:
    """Hold a conversation until the input ends.

    Args:
        session: The model, and the conversation so far.
        first: The user's first message. None: it is read, as all others are.
    """
    if sys.stdin.isatty():
        _in_a_terminal(session, first)
    else:
        _through_a_pipe(session, first)


def _through_a_pipe(session: ChatSession, first: str | None) -> None:
    """Answer each line. The first error ends the conversation: later lines may depend on this answer."""
    if first is not None:
        _print_answer(session, first)
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of the input is not UTF-8: {error}") from None
        if text:
            try:
                _print_answer(session, text)
            except UserError as error:
                raise UserError(f"line {number} of the input: {error}") from None


def _in_a_terminal(session: ChatSession, first: str | None) -> None:
    """Read messages and commands. After an error, the conversation goes on without the message."""
    with contextlib.suppress(ImportError):  # Python may be built without it
        import readline  # noqa: F401 - gives input() line editing and a history
    _tell("/help lists the commands, Ctrl-D leaves")
    if first is not None:
        _tell(f"{PROMPT}{first}")
    while True:
        text = _read_line() if first is None else first
        first = None
        match text:
            case None | "/exit":
                return
            case "":
                pass
            case "/clear":
                session.clear()
                _tell("the conversation is forgotten")
            case "/help":
                _tell(HELP)
            case _ if re.fullmatch(r"/\w+", text):
                _tell(f"there is no command {text}; /help lists the commands")
            case _:
                try:
                    _print_answer(session, text)
                except KeyboardInterrupt:
                    print(flush=True)
                except UserError as error:
                    _tell(f"error: {error}")


def _read_line() -> str | None:
    """Read a line from the terminal, without white space at its ends. None: the input has ended."""
    try:
        # With stdout redirected, input() would write its prompt there.
        if not sys.stdout.isatty():
            print(PROMPT, end="", file=sys.stderr, flush=True)
            return input().strip()
        return input(PROMPT).strip()
    except (EOFError, KeyboardInterrupt) as error:
        _tell("")  # the terminal's cursor is behind the prompt
        if isinstance(error, KeyboardInterrupt):
            raise
        return None


def _print_answer(session: ChatSession, text: str) -> None:
    ending = session.answer(text, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    if ending is not Ending.turn:
        _tell(f"warning: the answer is not complete: {ending.value}")


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
