"""Runs of wandb as their run directories describe them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from olmoe_train.run.loggers import read_records
from olmoe_train.utils.errors import UserError


@dataclass(frozen=True)
class WandbRun:
    """A run of wandb, and what it logged."""

    directory: Path
    id: str
    """Id of the run in wandb, from wandb.json."""
    name: str
    """Name of the run in wandb."""
    project: str
    entity: str | None
    """User or team that the run is configured for; None: the default of the account."""
    config: dict[str, Any]
    """config.yaml: the configuration of the last start."""
    numbers: frozenset[str]
    """Names in metrics.jsonl of values that are numbers, and not always null."""
    lists: frozenset[str]
    """Names in metrics.jsonl of lists that wandb has as pictures, histograms or tables."""
    records: tuple[dict[str, Any], ...]
    """metrics.jsonl."""


def read_wandb_runs(source: list[str]) -> list[WandbRun]:
    """Read run directories.

    Args:
        source: The run directories.

    Raises:
        UserError: A directory is not that of a run that has logged to wandb, or is given twice.
    """
    if not source:
        raise UserError("source=[] has no run directory; give source=RUN or source=[A,B]")
    runs = [_read_wandb_run(Path(path)) for path in source]
    for number, run in enumerate(runs):
        for other in runs[:number]:
            if run.id == other.id:
                raise UserError(
                    f"source={other.directory} and source={run.directory} are one wandb run, {run.id} "
                    "(wandb.json): give each run once"
                )
    return runs


def common_project(runs: list[WandbRun]) -> str:
    """The project that all runs are configured for.

    Raises:
        UserError: The runs name several projects.
    """
    projects = {run.project: run for run in runs}
    if len(projects) > 1:
        named = ", ".join(f"{run.directory}: {project}" for project, run in projects.items())
        raise UserError(
            f"the runs have different values of logging.wandb.project ({named}), and a workspace shows one "
            "project: send the runs to one project (wandb sync -p NAME RUN/wandb/...) and give project=NAME"
        )
    return runs[0].project


def _read_wandb_run(directory: Path) -> WandbRun:
    if not (directory / "config.yaml").is_file():
        raise UserError(f"source={directory} is not a run directory: it has no config.yaml")
    config: Any = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    logging = config.get("logging") or {}
    wandb = logging.get("wandb") or {}
    records = tuple(read_records(directory / "metrics.jsonl"))
    if not records:
        raise UserError(f"source={directory} has logged nothing yet: metrics.jsonl has no records")
    values = [(name, value) for record in records for name, value in record.items() if value is not None]
    # A dense model has a list of one load per layer, and no pictures.
    lists = {
        name
        for name, value in values
        if isinstance(value, list) and not (name.endswith("/load") and len(value) == 1)
    }
    if logging.get("details_every") == 0:  # then wandb gets no pictures; older runs do not have the key
        lists &= {"eval/samples", "eval/tasks"}
    return WandbRun(
        directory,
        _run_id(directory),
        str(wandb.get("name") or directory.resolve().name),
        str(wandb.get("project") or "olmoe-train"),
        wandb.get("entity"),
        config,
        frozenset(name for name, value in values if isinstance(value, int | float)),
        frozenset(lists),
        records,
    )


def _run_id(directory: Path) -> str:
    """The id in wandb.json, by which all starts in a run directory are one run of wandb."""
    path = directory / "wandb.json"
    if not path.is_file():
        raise UserError(
            f"source={directory} has no wandb.json: it was trained with logging.wandb.mode=disabled. A "
            "dashboard shows runs of wandb; train with logging.wandb.mode=offline or online"
        )
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has no id of a wandb run ({error!r}): restore the file") from error


def entity_without_network(entity: str | None, runs: list[WandbRun]) -> str | None:
    """The user or team that is given, or else that of the runs or the environment; None: none of them."""
    configured = [run.entity for run in runs if run.entity]
    return entity or next(iter(configured), None) or os.environ.get("WANDB_ENTITY") or None
