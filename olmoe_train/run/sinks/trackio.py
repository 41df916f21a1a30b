"""trackio: a local database of metrics, which `trackio show` draws. Nothing leaves the machine."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoe_train.run.sinks.base import Record
from olmoe_train.run.sinks.pictures import flow_map, load_map
from olmoe_train.utils.redaction import redact_text

REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL")
"""Environment variables that would make trackio log to another machine."""


class TrackioSink:
    name = "trackio"

    def __init__(self, project: str, name: str | None, run_dir: Path, config: dict[str, Any]) -> None:
        """Create the trackio run, or continue it.

        Args:
            project: logging.wandb.project.
            name: logging.wandb.name; None: the name of `run_dir`.
            run_dir: The run's directory.
            config: What trackio shows as the run's configuration, without secrets.
        """
        with _local(), _silent():
            import trackio

            self._trackio: Any = trackio
            self.run = trackio.init(
                project,
                name=redact_text(name or run_dir.resolve().name),
                config=config,
                resume="allow",
                embed=False,
            )

    def write(self, record: Record) -> None:
        trackio, values = self._trackio, record.values
        rich: dict[str, Any] = {}
        if record.has_details and (loads := record.loads):
            rich["router/load_map"] = trackio.Image(load_map(loads))
        if record.flow_LEE is not None:
            rich["router/flow"] = trackio.Image(flow_map(record.flow_LEE.numpy()))
        if "eval/samples" in values:
            rows = [[one["prompt"], one["completion"]] for one in values["eval/samples"]]
            rich["eval/samples"] = trackio.Table(columns=["prompt", "completion"], data=rows)
        for name, parts in values.items():
            if name.endswith("loss_by_position"):
                rich |= {f"{name}/{part:02d}": loss for part, loss in enumerate(parts) if loss is not None}
        numbers = {key: value for key, value in record.numbers.items() if key not in ("step", "time")}
        self.run.log(numbers | rich, step=record.step)  # trackio has a step and a time of its own

    def alert(self, name: str, text: str) -> None:
        with _silent():
            self.run.alert(name, text)

    def close(self) -> None:
        with _silent():
            self._trackio.finish()


@contextlib.contextmanager
def _local() -> Iterator[None]:
    held = {name: os.environ.pop(name) for name in REMOTE if name in os.environ}
    try:
        yield
    finally:
        os.environ |= held


def _silent() -> contextlib.redirect_stdout[io.StringIO]:
    """trackio prints what it does."""
    return contextlib.redirect_stdout(io.StringIO())
