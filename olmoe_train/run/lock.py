"""Allow one run per directory, with a lock that a dead process cannot hold."""

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
    """The lock on run_dir/lock, which rank 0 holds from start to end. The file's content names the owner.

    The lock is a POSIX record lock. The kernel or the file server releases it when the process ends, for
    whatever reason, and child processes do not inherit it. So there is no stale lock to break, and no clocks
    are compared. No other code in this process may open the file, because closing it would release the lock.
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
        """Erase the owner and release the lock. The run ended normally."""
        self._write("")
        self.close()

    def close(self) -> None:
        """Release the lock but keep the owner in the file, unless `release` erased it.

        The next run then logs a warning that the previous run did not end normally.
        """
        self.file.close()

    def _write(self, text: str) -> None:
        self.file.truncate(0)
        self.file.write(text)
        self.file.flush()

    def _owner(self) -> str:
        """Return the owner as part of a sentence, or an empty string if the last owner ended normally."""
        self.file.seek(0)
        try:
            owner = json.loads(self.file.read())
            return f" (host {owner['host']}, process {owner['pid']})"
        except (ValueError, KeyError, TypeError):
            return ""
