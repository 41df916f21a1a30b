"""Signal handling. SIGTERM, SIGUSR1 and the first SIGINT ask the run to save and end.

A second SIGINT ends the process at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# One Ctrl-C can arrive as several signals: one from the terminal, and others forwarded by torchrun.
SECONDS_BETWEEN_INTERRUPTS = 1.0
INTERRUPTED = 130
END = b"\0"
"""Tells the thread to end; no signal has the number 0."""


class Signals:
    """Receives signals from construction to `close`, where the run is in the main thread.

    Python gives signals to the main thread alone. A program that runs the training in another thread, as Ray
    Train's workers do, handles the signals of its process.

    A thread reads every signal as it arrives. It does so even while the main thread waits in a collective,
    during which Python does not call signal handlers.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        """
        Args:
            leave: Called before a second SIGINT ends the process, in the thread that reads the signals.
        """
        self.stop_requested = False
        self._leave = leave
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in STOP}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the previous signal handlers. Further calls have no effect."""
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        # The end of the pipe alone may not end the thread: forked loader workers hold the pipe open.
        os.write(self._write, END)
        self._thread.join()
        os.close(self._write)
        self._before = {}

    def _note(self, _number: int, _frame: object) -> None:
        self.stop_requested = True

    def _listen(self) -> None:
        interrupted = None
        while (byte := os.read(self._read, 1)) != END:
            if byte[0] != signal.SIGINT:
                continue
            if interrupted is not None and time.monotonic() - interrupted > SECONDS_BETWEEN_INTERRUPTS:
                self._leave()
                os._exit(INTERRUPTED)
            interrupted = interrupted or time.monotonic()
        os.close(self._read)
