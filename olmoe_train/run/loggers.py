"""Where metrics go: run_dir/metrics.jsonl, and wandb if it can. Rank 0 writes.

Observing never stops a run: at the first trouble wandb gets no more, and metrics.jsonl has everything.
"""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from olmoe_train.config.choices import WandbMode
from olmoe_train.config.train import WandbConfig
from olmoe_train.run.metrics_registry import find_metric
from olmoe_train.utils.files import atomic_write_text
from olmoe_train.utils.redaction import redact_text

log = logging.getLogger(__name__)

WANDB_START_S, WANDB_END_S = 30.0, 60.0
"""Longest time that rank 0 waits for wandb when a run starts, and when it ends."""


class MetricsLog:
    """metrics.jsonl and wandb of one run. Other ranks than 0 may call it and write nothing."""

    def __init__(self, run_dir: Path, wandb: WandbConfig, config: dict[str, Any], step: int) -> None:
        """
        Args:
            run_dir: where metrics.jsonl is; records of steps beyond `step` are removed from it.
            wandb: whether and how to log to wandb.
            config: the run's configuration without secrets, for wandb.
            step: the step that the run continues from; 0 for a new run.
        """
        self._path = run_dir / "metrics.jsonl"
        self._wandb: Any = None
        self._defined: set[str] = set()
        if dist.get_rank() == 0:
            records = read_records(self._path)
            self._resumes = records[-1].get("resumes", 0) + 1 if records else 0
            self._piece = WandbPiece()
            if wandb.mode is not WandbMode.disabled:
                last_logged = max((record["step"] for record in records), default=None)
                self._piece = begin_piece(run_dir / "wandb.json", step, last_logged)
            forget_after(self._path, step)
            self._wandb = start_wandb(wandb, run_dir, config, self._piece.id)

    def write(self, values: dict[str, Any]) -> None:
        """Append one record. values: `step`, and metrics by name: numbers, None, or lists of numbers.

        The record also gets its time, and how often the run was resumed before. wandb gets the numbers only.
        NaN and infinity are written as null, since JSON has neither.
        """
        if dist.get_rank() != 0:
            return
        values = values | {"time": round(time.time(), 3), "resumes": self._resumes}
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        scalars = {k: v for k, v in clean.items() if v is not None and not isinstance(v, list)}
        self._send(lambda run: self._define(run, scalars))
        self._send(lambda run: run.log(scalars, step=values["step"] + self._piece.shift))

    def _define(self, run: Any, scalars: dict[str, Any]) -> None:
        """Tell wandb of metrics that it has not seen: their axis, and what a summary of them is."""
        for name in scalars.keys() - self._defined - {"step"}:
            metric = find_metric(name)
            is_loss = metric is not None and metric.is_loss
            # wandb's own step may be shifted (WandbPiece), so the axis is the training's.
            run.define_metric(name, step_metric="step", summary="min" if is_loss else "last")
            self._defined.add(name)

    def close(self) -> None:
        self._send(lambda run: run.finish())
        self._wandb = None

    def _send(self, message: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            message(self._wandb)
        except Exception as error:
            log.warning("warning: wandb failed (%r) and gets no more; metrics.jsonl has everything", error)
            self._wandb = None


def forget_after(path: Path, step: int) -> None:
    """Remove the records of steps beyond `step`, from which a run resumes: those steps come again."""
    if not path.is_file():
        return
    kept = [record for record in read_records(path) if record["step"] <= step] if step else []
    atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in their order. A last line that a crash cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class WandbPiece:
    """What one start of a run adds to its wandb run; kept in run_dir/wandb.json."""

    id: str = ""
    """Id of the wandb run, which all starts in this run directory share."""
    shift: int = 0
    """wandb's own step is the step of the training plus this number. wandb takes steps in increasing order
    only, and a start repeats the steps after its checkpoint."""


def begin_piece(path: Path, step: int, last_logged: int | None) -> WandbPiece:
    """The next piece of the wandb run of this run directory.

    Args:
        path: File that holds the piece of the previous start; replaced.
        step: Step from which the run continues.
        last_logged: Greatest step that the previous starts logged; None: nothing was logged.
    """
    try:
        before = json.loads(path.read_text())
        again = max(0, last_logged - step) + 1 if last_logged is not None else 0
        piece = WandbPiece(before["id"], before["shift"] + again)
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("warning: %s cannot be read (%s): this start is a new wandb run", path, error)
        piece = WandbPiece(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    atomic_write_text(path, json.dumps(asdict(piece)) + "\n")
    return piece


def start_wandb(cfg: WandbConfig, run_dir: Path, config: dict[str, Any], run_id: str | None = None) -> Any:
    """The wandb run with this id, created or continued; None where wandb is disabled or cannot start."""
    if cfg.mode is WandbMode.disabled:
        return None
    try:
        import wandb  # takes a second to import, and a run that disables it need not have it
    except ImportError as error:
        log.warning("warning: wandb could not start (%s); metrics.jsonl has everything", error)
        return None
    mode = cfg.mode.value
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        log.warning(
            "warning: logging.wandb.mode=online, but there is no API key: logging offline (wandb sync later)"
        )
        mode = "offline"
    try:
        run = wandb.init(
            project=cfg.project,
            id=run_id,
            resume="allow",
            name=redact_text(cfg.name or run_dir.resolve().name),
            dir=str(run_dir),
            mode=mode,
            config=config,
            # x_disable_meta: otherwise wandb uploads the command line and the git remote's URL unredacted.
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=WANDB_START_S,
                finish_timeout=WANDB_END_S,
                finish_timeout_raises=True,
                x_disable_meta=True,
            ),
        )
        run.define_metric("step")
        return run
    except Exception as error:
        log.warning("warning: wandb could not start (%s); metrics.jsonl has everything", error)
        return None
