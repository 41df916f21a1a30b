"""Ends quietly when nobody reads the output any more, as in `olmoe VERB ... | head -1`."""

import logging
import os
import select
import sys
from collections.abc import Callable

from olmoe_train.utils.exit_codes import CLOSED_OUTPUT


def quietly(command: Callable[[], int]) -> int:
    """Run a command. If the reader of its output leaves, end it without a traceback.

    Returns:
        The exit code of the command, or CLOSED_OUTPUT if it could not write on.

    Raises:
        BrokenPipeError: Another pipe than stdout and stderr is closed.
    """
    try:
        code = command()
    except BrokenPipeError:
        if not discard_closed_output():
            raise
        code = CLOSED_OUTPUT
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # what was left in the buffer; the command itself is done
            discard_closed_output()
            stream.flush()
    return code


def discard_closed_output() -> bool:
    """From now on, discard what is written to stdout or stderr if its reader has left.

    Returns:
        Whether the reader of one of them has left.
    """
    found = False
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):  # replaced by an object, as in a notebook
            continue
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
            found = True
    return found


class ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Logs to the console. When its reader leaves, the program goes on, and no error is reported."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Report an error of logging, unless it is that the console is closed."""
        if not (isinstance(sys.exception(), BrokenPipeError) and discard_closed_output()):
            super().handleError(record)
