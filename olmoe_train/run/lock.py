"""One run per directory: a lock that a dead owner cannot hold."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from olmoe_train.utils.errors import UserError

log = logging.getLogger(__name__)


class RunLock:
    """run_dir/lock, held by rank 0 from start to end; what is in it names the owner.

    A POSIX record lock: the kernel, or the file server, lets go of it when its process ends, however it
    ends, and children do not inherit it. So there is no stale lock to break, and no clock is compared.
    Nothing else in this process may open the file: closing it would release the lock.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = (run_dir / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("warning: nothing keeps a second run out of %s: %s", run_dir, error.strerror)
                return
            owner = self._owner()
            self.file.close()
            raise UserError(
                f"run_dir={run_dir} belongs to a run that is still going on{owner}: use another run_dir, "
                "or stop that one first"
            ) from None
        if owner := self._owner():
            log.warning("WARNING: the run before this one%s did not end in order; it is continued", owner)
        self._write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}))

    def release(self) -> None:
        """The run ended in order: the next one finds no owner."""
        self._write("")
        self.close()

    def close(self) -> None:
        """Let go of the lock. Without `release` before it, the next run is warned of an owner that failed."""
        self.file.close()

    def _write(self, text: str) -> None:
        self.file.truncate(0)
        self.file.write(text)
        self.file.flush()

    def _owner(self) -> str:
        """As words in a sentence; empty where the last owner ended in order."""
        self.file.seek(0)
        try:
            owner = json.loads(self.file.read())
            return f" (host {owner['host']}, process {owner['pid']})"
        except (ValueError, KeyError, TypeError):
            return ""
