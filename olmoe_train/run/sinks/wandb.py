"""Weights & Biases: one wandb run per run directory, whatever the number of starts."""

import json
import logging
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from olmoe_train.config.train import WandbConfig
from olmoe_train.run.metrics_registry import find_metric
from olmoe_train.run.sinks.base import Record
from olmoe_train.run.sinks.pictures import flow_map, load_map
from olmoe_train.utils.files import atomic_write_text
from olmoe_train.utils.redaction import redact_text

log = logging.getLogger(__name__)

WANDB_START_S, WANDB_END_S = 30.0, 60.0
"""Longest time that rank 0 waits for wandb when a run starts, and when it ends."""
AXES = ("step", "tokens")
_TITLE_LENGTH = 63  # of an alert
_BINS = 16  # of the histogram of a layer's loads
_OF_TASK = {
    "task": "task",
    "metric": "metric",
    "score": "score",
    "stderr": "standard error",
    "chance": "chance",
    "questions": "questions",
}
"""Columns of the table of tasks, by the keys of eval/tasks."""


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


class WandbSink:
    name = "wandb"

    def __init__(self, cfg: WandbConfig, run_dir: Path, config: dict[str, Any], piece: WandbPiece) -> None:
        """Create the wandb run, or continue it.

        Args:
            cfg: The `logging.wandb` section; the mode is not `disabled`.
            run_dir: The run's directory.
            config: What wandb shows as the run's configuration, without secrets.
            piece: Which wandb run this is.
        """
        import wandb  # takes a second to import, and a run that disables it need not have it

        self._wandb, self._shift, self._axis = wandb, piece.shift, cfg.axis.value
        self._defined: set[str] = set(AXES)
        mode: Any = cfg.mode.value
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            log.warning(
                "warning: logging.wandb.mode=online, but there is no API key: logging offline (wandb sync "
                "later)"
            )
            mode = "offline"
        self.run: Any = wandb.init(
            project=cfg.project,
            entity=cfg.entity,
            id=piece.id or None,
            resume="allow",
            name=redact_text(cfg.name or run_dir.resolve().name),
            group=cfg.group,
            job_type=cfg.job_type,
            tags=cfg.tags,
            notes=None if cfg.notes is None else redact_text(cfg.notes),
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
        for axis in AXES:
            self.run.define_metric(axis)

    def write(self, record: Record) -> None:
        rich = self._rich(record)
        self._define(record.numbers, rich)
        self.run.log(record.numbers | rich, step=record.step + self._shift)

    def alert(self, name: str, text: str) -> None:
        self.run.alert(title=name[:_TITLE_LENGTH], text=text, level="WARN")

    def close(self) -> None:
        self.run.finish()

    def _define(self, numbers: dict[str, float], rich: dict[str, Any]) -> None:
        """Tell wandb of metrics that it has not seen: their axis, and what a summary of them is."""
        for name in [*numbers, *rich]:
            if name in self._defined:
                continue
            self._defined.add(name)
            # wandb's own step may be shifted (WandbPiece), so the axis is one of the training's.
            if name in rich:
                self.run.define_metric(name, step_metric=self._axis)
                continue
            metric = find_metric(name)
            summary = "last" if metric is None else metric.summary
            self.run.define_metric(name, step_metric=self._axis, summary=summary)

    def _rich(self, record: Record) -> dict[str, Any]:
        """Images, histograms and tables of a record."""
        wandb, values, rich = self._wandb, record.values, {}
        if record.has_details and (loads := record.loads):
            rich["router/load_map"] = wandb.Image(
                load_map(loads), caption="layers x experts; white 1/E, red more, blue less (1/4 to 4 times)"
            )
            rich |= {
                f"router/layer_{layer:02d}/load": wandb.Histogram(load, num_bins=_BINS)
                for layer, load in enumerate(loads)
            }
        if record.flow_LEE is not None:
            rich["router/flow"] = wandb.Image(
                flow_map(record.flow_LEE.numpy()),
                caption="first choice in a layer (rows) and in the next one (columns); white: independent",
            )
        for name, parts in values.items():
            if name.endswith("loss_by_position"):
                # Bars over the positions, whose heights are losses; wandb shows them over the steps.
                heights = [0.0 if loss is None else loss for loss in parts]
                edges = [part / len(parts) for part in range(len(parts) + 1)]
                rich[name] = wandb.Histogram(np_histogram=(heights, edges))
        if "eval/samples" in values:
            rows = [[record.step, one["prompt"], one["completion"]] for one in values["eval/samples"]]
            rich["eval/samples"] = wandb.Table(columns=["step", "prompt", "completion"], data=rows)
        if "eval/tasks" in values:
            rows = [[record.step, *(one[key] for key in _OF_TASK)] for one in values["eval/tasks"]]
            rich["eval/tasks"] = wandb.Table(columns=["step", *_OF_TASK.values()], data=rows)
        return rich
