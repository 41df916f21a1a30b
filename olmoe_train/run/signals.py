"""SIGTERM, SIGUSR1 and a first SIGINT ask the run to save and end; a second SIGINT ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C may arrive several times: from the terminal, and passed on by torchrun.
SECONDS_BETWEEN_INTERRUPTS = 1.0
INTERRUPTED = 130


class Signals:
    """Listens from construction to `close`. A thread sees every signal as it comes, even while the main
    thread waits in a collective, where Python would not call a handler."""

    def __init__(self, leave: Callable[[], None]) -> None:
        """leave: called, in another thread, before a second SIGINT ends the process."""
        self.stop_requested = False
        self._leave = leave
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in STOP}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """Restore the handlers from before; may be called again."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._write)  # ends the thread
        self._before = {}

    def _note(self, _number: int, _frame: object) -> None:
        self.stop_requested = True

    def _listen(self) -> None:
        interrupted = None
        while byte := os.read(self._read, 1):
            if byte[0] != signal.SIGINT:
                continue
            if interrupted is not None and time.monotonic() - interrupted > SECONDS_BETWEEN_INTERRUPTS:
                self._leave()
                os._exit(INTERRUPTED)
            interrupted = interrupted or time.monotonic()
        os.close(self._read)
