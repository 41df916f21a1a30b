"""The run directory, and what guards a run while it lasts.

run_dir/config.yaml       resolved configuration of the last start
        metrics.jsonl     one JSON object per logged step (loggers.py)
        log.txt           what the console showed
        ranks.json        (host, process) of each rank
        lock              who runs here (lock.py)
        status.json       {"state": running|done|stopped|failed, "reason", "step", "last_step", "time"}
        tokenizer/        copied from the prepared data, for exports
        checkpoints/step-00000100/
        hf/               exports
"""

import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from olmoe_train.config.compose import plain_values
from olmoe_train.distributed.collectives import on_any_rank, on_rank_0
from olmoe_train.distributed.rendezvous import TIMEOUT_KEY, place_of, time_limit
from olmoe_train.run.lock import RunLock
from olmoe_train.run.signals import Signals
from olmoe_train.run.watchdog import Watchdog, ended_ranks, ranks_of
from olmoe_train.utils.console import ConsoleHandler
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import RedactingFormatter, redact, redact_text

log = logging.getLogger(__name__)
_PACKAGE = logging.getLogger("olmoe_train")


class Run:
    """A run in its directory, from start to end: lock, log, status, signal handlers and watchdog.

    A context manager, entered by every rank; rank 0 locks the directory and writes. However the block ends,
    signal handlers are restored, the watchdog stops, and lock and log are closed; an exception is recorded in
    status.json first.
    """

    def __init__(
        self,
        run_dir: str,
        step_timeout_s: float,
        rendezvous_timeout_s: float,
        tokenizer: Path,
        warnings: list[str],
    ) -> None:
        """
        Args:
            run_dir: created if missing.
            step_timeout_s: seconds without a heartbeat after which the watchdog ends the process.
            rendezvous_timeout_s: seconds that this rank waits for the others before the watchdog starts and
                after it has ended; then the process ends.
            tokenizer: directory of tokenizer files to copy into the run directory, if it exists.
            warnings: logged once the log is open.
        """
        self.path = Path(run_dir)
        self.stopping = False
        """Whether the ranks have agreed to stop; equal on every rank."""
        self.saved_step = 0
        """Newest step that is saved; 0: none."""
        self._is_writer = dist.get_rank() == 0
        self._timeout, self._rendezvous_timeout = step_timeout_s, rendezvous_timeout_s
        self._tokenizer, self._warnings = tokenizer, warnings
        self._to_close = ExitStack()

    def __enter__(self) -> "Run":
        try:
            with self._waiting_for_ranks("start"):
                on_rank_0(self._make)
                self._to_close.callback(close_log)
                open_log(self.path, logging.INFO if self._is_writer else logging.ERROR)
                on_rank_0(self._open)
                for warning in self._warnings:
                    log.warning("warning: %s", warning)
                self.watchdog = Watchdog(self.path, self._timeout, self._give_up)
            self._to_close.callback(self.watchdog.close)
            self.write_status("running", "started", 0, 0)
            self.signals = Signals(lambda: self._give_up("a second interrupt: left at once"))
            self._to_close.callback(self.signals.close)
        except BaseException:
            self._to_close.close()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            record_failure(self.path, error)
        self._to_close.close()

    def close_at_end(self, close: Callable[[], None]) -> None:
        """Call `close` when the block ends, however it ends."""
        self._to_close.callback(close)

    @property
    def stop_requested(self) -> bool:
        """Whether this rank received a signal to stop."""
        return self.signals.stop_requested

    def agree_to_stop(self) -> None:
        """Stop if any rank received a signal; collective."""
        self.stopping = on_any_rank(self.stopping or self.stop_requested)

    def write_config(self, cfg: object) -> None:
        """Write config.yaml, once it is known that the run can continue with it. cfg: a config dataclass."""
        if self._is_writer:
            OmegaConf.save(OmegaConf.create(redact(plain_values(cfg))), self.path / "config.yaml")

    def finish(self, last_step: int) -> None:
        """Record in log and status.json how the run ended: `saved_step` of `last_step` steps; collective."""
        step = self.saved_step
        if step >= last_step:
            state, reason = "done", "reached the last step"
            line = f"done: step {step} of {last_step}; everything is in {self.path}"
        else:
            state, reason = "stopped", "signal" if self.stopping else "trainer.stop_at_step"
            line = f"stopped at step {step} of {last_step} ({reason}); run the same command again to continue"
        # Before any rank leaves: a launcher reads status.json as soon as the ranks of its node have ended.
        self.write_status(state, reason, step, last_step)
        self.watchdog.close()
        with self._waiting_for_ranks("end"):
            dist.barrier()  # until no watchdog can take a rank that has finished for one that died
        self.signals.close()
        log.info("%s", line)
        if self._lock is not None:
            self._lock.release()

    def _waiting_for_ranks(self, moment: str) -> AbstractContextManager[None]:
        """End this process if the others do not come; no watchdog does so here. moment: start or end."""

        def expired() -> None:
            reason = (
                f"{place_of(dist.get_rank())} waited {TIMEOUT_KEY}={self._rendezvous_timeout:g} s "
                f"for the other ranks at the {moment} of the run"
            )
            if moment == "start":  # status.json is still the one of an earlier run, or of another
                log.error("ERROR: %s", reason)
            else:
                self._give_up(reason)

        return time_limit(self._rendezvous_timeout, expired)

    def write_status(self, state: str, reason: str, step: int, last_step: int) -> None:
        if self._is_writer:
            _write_status(self.path, {"state": state, "reason": reason, "step": step, "last_step": last_step})

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "log.txt").open("a").close()
        except OSError as error:
            raise UserError(f"run_dir={self.path}: cannot be written: {error.strerror}") from None

    _lock: RunLock | None = None

    def _open(self) -> None:
        self._lock = RunLock(self.path)
        self._to_close.callback(self._lock.close)
        shutil.rmtree(self.path / "stalled", ignore_errors=True)
        if self._tokenizer.is_dir():
            shutil.copytree(self._tokenizer, self.path / "tokenizer", dirs_exist_ok=True)

    def _give_up(self, reason: str) -> None:
        """Called in another thread, on any rank, before its process leaves."""
        log.error("ERROR: %s", reason)
        _record(self.path, reason)


def open_log(run_dir: Path, level: int) -> None:
    """Log to the console and to run_dir/log.txt."""
    close_log()
    _PACKAGE.propagate = False
    _PACKAGE.setLevel(level)
    for handler in (ConsoleHandler(sys.stdout), logging.FileHandler(run_dir / "log.txt", delay=True)):
        handler.setFormatter(RedactingFormatter())
        _PACKAGE.addHandler(handler)


def close_log() -> None:
    for handler in list(_PACKAGE.handlers):
        _PACKAGE.removeHandler(handler)
        handler.close()
    _PACKAGE.propagate = True


def record_failure(run_dir: Path, error: BaseException) -> None:
    """Leave the reason in status.json, if this process is one of the run's ranks."""
    ranks = ranks_of(run_dir)
    if (socket.gethostname(), os.getpid()) not in ranks:
        return  # it never got so far, or the directory is another run's
    reason = f"{type(error).__name__}: {error}"
    if not isinstance(error, UserError):
        gone = ended_ranks(ranks)
        reason = f"{place_of(dist.get_rank())}: {reason}" + (f" ({gone})" if gone else "")
    _record(run_dir, reason)


def _record(run_dir: Path, reason: str) -> None:
    """The first to fail knows best why; what others meet is what comes of it."""
    status = json.loads((run_dir / "status.json").read_text())
    if status["state"] != "failed":
        _write_status(run_dir, status | {"state": "failed", "reason": redact_text(reason)})


def _write_status(run_dir: Path, status: dict[str, Any]) -> None:
    """Replaced in one rename, so that a reader never sees half of it; not forced to the disk, for speed."""
    temporary = run_dir / f"status.json.{socket.gethostname()}.{os.getpid()}"
    temporary.write_text(json.dumps(status | {"time": time.time()}) + "\n")
    temporary.replace(run_dir / "status.json")
