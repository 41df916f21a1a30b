"""The run directory: config.yaml, log.txt, status.json, tokenizer/, checkpoints/; and where a run stands.

run_dir/config.yaml       resolved configuration of the last start
        metrics.jsonl     one JSON object a logged step (metrics.py)
        log.txt           what the console showed
        status.json       {"state": running|done|stopped|failed, "reason", "step", "last_step", "time"}
        tokenizer/        copied from the prepared data, for exports
        checkpoints/step-00000100/
        hf/               exports
"""

import json
import logging
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from olmoe_train.checkpoint.training import complete_checkpoints
from olmoe_train.cli import OK, STOPPED_BY_SIGNAL
from olmoe_train.config import TrainConfig
from olmoe_train.errors import UserError

log = logging.getLogger("olmoe")


@dataclass(frozen=True)
class Progress:
    """What a run has done; everything that resuming needs besides the tensors."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens trained on, padding not counted."""
    samples: int = 0
    """Sequences drawn from the data order: the loader's whole state."""
    expert_last_used: list[list[int]] | None = None
    """The last step at which each layer sent a token to each expert [L][E]; None: no step yet."""
    guard: dict[str, Any] | None = None
    """Losses, gradient norms and skipped steps of late (guard.GuardState); None: no step yet."""

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Progress":
        known: dict[str, Any] = {item.name: state[item.name] for item in fields(cls)}
        return cls(**known)


class RunDirectory:
    """Opened by every rank; rank 0 writes. SIGTERM and SIGINT set `stop_requested`; a second SIGINT leaves
    at once."""

    def __init__(self, cfg: TrainConfig, warnings: list[str]) -> None:
        self.path = Path(cfg.run_dir)
        self.stop_requested = False
        self.is_writer = dist.get_rank() == 0
        if self.is_writer:
            self.path.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.structured(cfg), self.path / "config.yaml")
            tokenizer = Path(cfg.data.dir) / "tokenizer"
            if tokenizer.is_dir():
                shutil.copytree(tokenizer, self.path / "tokenizer", dirs_exist_ok=True)
        dist.barrier()
        self._open_log()
        for warning in warnings:
            log.warning("warning: %s", warning)
        self.write_status("running", "started", 0, 0)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def checkpoints_to_resume(self, choice: str) -> list[Path]:
        """What checkpoint.resume (auto, never, or a directory) asks for, newest first, on all ranks."""
        if choice not in ("auto", "never"):
            return [Path(choice)]
        found: list[Any] = [complete_checkpoints(self.path)]
        dist.broadcast_object_list(found)
        if choice == "never" and found[0]:
            raise UserError(
                f"checkpoint.resume=never, but run_dir={self.path} already holds {found[0][0].name}: "
                "use another run_dir, delete this one, or checkpoint.resume=auto to continue it"
            )
        return found[0]

    def set_aside(self, checkpoint: Path, error: Exception) -> None:
        """Keep a damaged checkpoint under another name: its step will be saved again."""
        log.warning("WARNING: %s; it is set aside and the checkpoint before it is used", error)
        if self.is_writer and checkpoint.parent == self.path / "checkpoints":
            checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.damaged"))
        dist.barrier()

    def check_fingerprint(self, saved: dict[str, Any], current: dict[str, Any], checkpoint: Path) -> None:
        """The data order must be the one the checkpoint was made with, or its position means nothing."""
        changed = [
            f"{key}: {saved.get(key)} in the checkpoint, {current.get(key)} now"
            for key in sorted(saved.keys() | current.keys())
            if saved.get(key) != current.get(key)
        ]
        if changed:
            raise UserError(
                "\n  ".join(
                    [
                        f"{checkpoint} was made on other data:",
                        *changed,
                        "restore these, or use another run_dir",
                    ]
                )
            )

    def finish(self, step: int, last_step: int, signalled: bool) -> int:
        """Record how the run ended; its exit code."""
        if step >= last_step:
            self.write_status("done", "reached the last step", step, last_step)
            log.info("done: step %d of %d; everything is in %s", step, last_step, self.path)
            return OK
        reason = "signal" if signalled else "trainer.stop_at_step"
        self.write_status("stopped", reason, step, last_step)
        log.info(
            "stopped at step %d of %d (%s); run the same command again to continue", step, last_step, reason
        )
        return STOPPED_BY_SIGNAL if signalled else OK

    def write_status(self, state: str, reason: str, step: int, last_step: int) -> None:
        if self.is_writer:
            _write_status(self.path, {"state": state, "reason": reason, "step": step, "last_step": last_step})

    def _open_log(self) -> None:
        log.handlers.clear()
        log.propagate = False
        log.setLevel(logging.INFO if self.is_writer else logging.ERROR)
        log.addHandler(logging.StreamHandler(sys.stdout))
        if self.is_writer:
            log.addHandler(logging.FileHandler(self.path / "log.txt"))

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.stop_requested and number == signal.SIGINT:
            sys.exit(130)
        self.stop_requested = True


def record_failure(run_dir: str, error: BaseException) -> None:
    """Leave the reason in status.json, if the run got so far as to have one."""
    path = Path(run_dir) / "status.json"
    if os.environ.get("RANK", "0") == "0" and path.is_file():
        status = json.loads(path.read_text())
        _write_status(path.parent, status | {"state": "failed", "reason": f"{type(error).__name__}: {error}"})


def _write_status(run_dir: Path, status: dict[str, Any]) -> None:
    """Replaced in one rename, so that a reader never sees half of it."""
    temporary = run_dir / "status.json.tmp"
    temporary.write_text(json.dumps(status | {"time": time.time()}) + "\n")
    temporary.replace(run_dir / "status.json")
