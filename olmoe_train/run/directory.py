"""The run directory: config.yaml, log.txt, status.json, tokenizer/, checkpoints/; and where a run stands.

run_dir/config.yaml       resolved configuration of the last start
        metrics.jsonl     one JSON object a logged step (metrics.py)
        log.txt           what the console showed
        ranks.json        (host, process) of each rank
        lock              who runs here (run_lock.py)
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
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from olmoe_train.config.train import TrainConfig
from olmoe_train.data.mixture import mixture_components
from olmoe_train.distributed.collectives import on_rank_0
from olmoe_train.run.lock import RunLock
from olmoe_train.run.signals import Signals
from olmoe_train.run.watchdog import Watchdog, ended_ranks, ranks_of
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import OK, STOPPED_BY_SIGNAL
from olmoe_train.utils.redaction import RedactingFormatter, redact, redact_text

log = logging.getLogger("olmoe")


class RunDirectory:
    """Opened by every rank; rank 0 locks it and writes. Has the ears for signals, and the watchdog."""

    def __init__(self, cfg: TrainConfig, warnings: list[str]) -> None:
        self.path = Path(cfg.run_dir)
        self.is_writer = dist.get_rank() == 0
        self._lock: RunLock | None = None
        on_rank_0(self._make)
        open_log(self.path, logging.INFO if self.is_writer else logging.ERROR)
        on_rank_0(lambda: self._open(cfg))
        for warning in warnings:
            log.warning("warning: %s", warning)
        self.watchdog = Watchdog(self.path, cfg.trainer.timeout, self._give_up)
        self.write_status("running", "started", 0, 0)
        self.signals = Signals(lambda: self._give_up("a second interrupt: left at once"))

    def write_config(self, cfg: TrainConfig) -> None:
        """Once it is known that the run can go on with it."""
        if self.is_writer:
            values = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
            OmegaConf.save(OmegaConf.create(redact(values)), self.path / "config.yaml")

    def finish(self, step: int, last_step: int, signalled: bool) -> int:
        """Record how the run ended, `step` being saved; its exit code."""
        self.watchdog.close()
        dist.barrier()  # until no watchdog takes a rank that has finished for one that died
        self.signals.close()
        if step >= last_step:
            self.write_status("done", "reached the last step", step, last_step)
            log.info("done: step %d of %d; everything is in %s", step, last_step, self.path)
        else:
            reason = "signal" if signalled else "trainer.stop_at_step"
            self.write_status("stopped", reason, step, last_step)
            again = "run the same command again to continue"
            log.info("stopped at step %d of %d (%s); %s", step, last_step, reason, again)
        if self._lock is not None:
            self._lock.release()
        return STOPPED_BY_SIGNAL if signalled and step < last_step else OK

    def write_status(self, state: str, reason: str, step: int, last_step: int) -> None:
        if self.is_writer:
            _write_status(self.path, {"state": state, "reason": reason, "step": step, "last_step": last_step})

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "log.txt").open("a").close()
        except OSError as error:
            raise UserError(f"run_dir={self.path}: cannot be written: {error.strerror}") from None

    def _open(self, cfg: TrainConfig) -> None:
        self._lock = RunLock(self.path)
        shutil.rmtree(self.path / "stalled", ignore_errors=True)
        tokenizer = mixture_components(cfg.data)[0].directory / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, self.path / "tokenizer", dirs_exist_ok=True)

    def _give_up(self, reason: str) -> None:
        """Called in another thread, on any rank, before its process leaves."""
        log.error("ERROR: %s", reason)
        _record(self.path, reason)


def open_log(run_dir: Path, level: int) -> None:
    """The console and run_dir/log.txt."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(level)
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(run_dir / "log.txt", delay=True)):
        handler.setFormatter(RedactingFormatter())
        log.addHandler(handler)


def record_failure(run_dir: str, error: BaseException) -> None:
    """Leave the reason in status.json, if this process is one of the run's ranks."""
    path = Path(run_dir)
    ranks = ranks_of(path)
    if (socket.gethostname(), os.getpid()) not in ranks:
        return  # it never got so far, or the directory is another run's
    reason = f"{type(error).__name__}: {error}"
    if not isinstance(error, UserError):
        gone = ended_ranks(ranks)
        reason = f"rank {dist.get_rank()}: {reason}" + (f" ({gone})" if gone else "")
    _record(path, reason)


def _record(run_dir: Path, reason: str) -> None:
    """The first to fail knows best why; what others meet is what comes of it."""
    status = json.loads((run_dir / "status.json").read_text())
    if status["state"] != "failed":
        _write_status(run_dir, status | {"state": "failed", "reason": redact_text(reason)})


def _write_status(run_dir: Path, status: dict[str, Any]) -> None:
    """Replaced in one rename, so that a reader never sees half of it."""
    temporary = run_dir / f"status.json.{socket.gethostname()}.{os.getpid()}"
    temporary.write_text(json.dumps(status | {"time": time.time()}) + "\n")
    temporary.replace(run_dir / "status.json")
