"""Where metrics go: run_dir/metrics.jsonl, and the sinks that the configuration names. Rank 0 writes.

Observing never stops a run: at the first trouble a sink gets no more, and metrics.jsonl has everything.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.choices import WandbMode
from olmoe_train.config.train import LoggingConfig
from olmoe_train.run.alarms import AlertsOfRun
from olmoe_train.run.sinks.base import Record, Sink
from olmoe_train.run.sinks.tensorboard import TensorBoardSink
from olmoe_train.run.sinks.trackio import TrackioSink
from olmoe_train.run.sinks.wandb import WandbSink, begin_piece
from olmoe_train.utils.files import atomic_write_text
from olmoe_train.utils.finite import finite_or_none

log = logging.getLogger(__name__)


class MetricsLog:
    """metrics.jsonl and the sinks of one run. Other ranks than 0 may call it and write nothing."""

    def __init__(self, run_dir: Path, cfg: LoggingConfig, config: dict[str, Any], step: int) -> None:
        """
        Args:
            run_dir: where metrics.jsonl is; records of steps beyond `step` are removed from it.
            cfg: the `logging` section, which names the sinks.
            config: the run's configuration without secrets, for the sinks.
            step: the step that the run continues from; 0 for a new run.
        """
        self._path, self.step = run_dir / "metrics.jsonl", step
        self._sinks: list[Sink] = []
        if dist.get_rank() == 0:
            records = read_records(self._path)
            self._resumes = records[-1].get("resumes", 0) + 1 if records else 0
            last_logged = max((record["step"] for record in records), default=None)
            forget_after(self._path, step)
            self._alerts = AlertsOfRun(run_dir / "alerts.json", read_records(self._path))
            self._start_sinks(run_dir, cfg, config, step, last_logged)

    def _start_sinks(
        self, run_dir: Path, cfg: LoggingConfig, config: dict[str, Any], step: int, last_logged: int | None
    ) -> None:
        wandb = cfg.wandb
        if wandb.mode is not WandbMode.disabled:
            piece = begin_piece(run_dir / "wandb.json", step, last_logged)
            self._start("wandb", lambda: WandbSink(wandb, run_dir, config, piece))
        if cfg.tensorboard:
            self._start("TensorBoard", lambda: TensorBoardSink(run_dir, step))
        if cfg.trackio:
            self._start("trackio", lambda: TrackioSink(wandb.project, wandb.name, run_dir, config))

    def _start(self, name: str, sink: Callable[[], Sink]) -> None:
        try:
            self._sinks.append(sink())
        except Exception as error:
            log.warning("warning: %s could not start (%s); metrics.jsonl has everything", name, error)

    def write(
        self, values: dict[str, Any], *, has_details: bool = False, flow_LEE: Tensor | None = None
    ) -> None:
        """Append one record, which also gets its time, how often the run was resumed, and new alerts.

        NaN and infinity are written as null, since JSON has neither.

        Args:
            values: `step`, and metrics by name: numbers, None, lists of numbers, or samples.
            has_details: whether the sinks draw pictures of this record.
            flow_LEE: routing flow, for pictures only.
        """
        if dist.get_rank() != 0:
            return
        values = values | {"time": round(time.time(), 3), "resumes": self._resumes}
        self.step = values["step"]
        if new := self._alerts.take_unrecorded():
            values["alerts"] = new
        clean = {name: finite_or_none(value) for name, value in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        record = Record(clean, has_details, flow_LEE)
        self._send(lambda sink: sink.write(record))

    def alert(self, name: str, text: str) -> bool:
        """Tell people of something, unless this run has told them before. The next record has it, too.

        Args:
            name: what makes it the same thing: "dead experts".
            text: one or two sentences.

        Returns:
            Whether it is new. False on other ranks than 0.
        """
        if dist.get_rank() != 0 or not self._alerts.add(name, text):
            return False
        self._send(lambda sink: sink.alert(name, text))
        return True

    def close(self) -> None:
        self._send(lambda sink: sink.close())
        self._sinks = []

    def _send(self, message: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                message(sink)
            except Exception as error:
                text = "warning: %s failed (%r) and gets no more; metrics.jsonl has everything"
                log.warning(text, sink.name, error)
                self._sinks.remove(sink)


def close_metrics(metrics: MetricsLog, run_dir: Path) -> None:
    """Close the metrics of a run, whose failure becomes an alert. Nothing happens if they are closed."""
    if dist.get_rank() == 0:
        status = json.loads((run_dir / "status.json").read_text())
        if status["state"] == "failed":
            metrics.alert(f"failed after step {metrics.step}", status["reason"])
    metrics.close()


def draws_pictures(cfg: LoggingConfig) -> bool:
    """Whether any sink draws pictures: only then is it worth counting what only pictures show."""
    return cfg.wandb.mode is not WandbMode.disabled or cfg.tensorboard or cfg.trackio


def forget_after(path: Path, step: int) -> None:
    """Remove the records of steps beyond `step`, from which a run resumes: those steps come again."""
    if not path.is_file():
        return
    copy_records(path, path, step)


def copy_records(source: Path, target: Path, step: int) -> None:
    """Replace a metrics.jsonl by the records of another one up to `step`. step=0: by none."""
    kept = [record for record in read_records(source) if record["step"] <= step] if step else []
    atomic_write_text(target, "".join(json.dumps(record) + "\n" for record in kept))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in their order. A last line that a crash cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
