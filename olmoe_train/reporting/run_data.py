"""What a run directory says about its run: metrics.jsonl, and config.yaml and status.json where they are
there.

metrics.jsonl is read record by record, and again only from where the last reading ended, so that a report can
follow a run that is training.

Shapes: N records, L layers, E experts.
"""

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from olmoe_train.data.manifest import MANIFEST
from olmoe_train.utils.errors import UserError

METRICS = "metrics.jsonl"
_LOAD = re.compile(r"router/layer_(\d+)/load")
TASK_TEXTS, TASK_NUMBERS = ("task", "metric"), ("score", "stderr", "chance", "questions")
_NOT_METRICS = ("step", "tokens", "time", "resumes", "eval/samples", "eval/tasks", "alerts")


@dataclass
class Series:
    """The values of one metric, in the order of their records."""

    steps: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    """Numbers, with NaN for null; or float32 arrays, all of one length."""

    def add(self, step: int, value: Any) -> None:
        self.steps.append(step)
        self.values.append(value)


@dataclass
class Start:
    """The records that one start of the run wrote."""

    resumes: int
    """Starts before this one."""
    first_step: int
    first_time: float | None
    """Seconds since 1970; None: the records carry no time."""
    last_step: int
    last_time: float | None


@dataclass
class RunData:
    """Everything in the metrics.jsonl of one run."""

    scalars: dict[str, Series] = field(default_factory=dict)
    lists: dict[str, Series] = field(default_factory=dict)
    """Metrics that are lists of numbers, without the experts' loads."""
    loads: Series = field(default_factory=Series)
    """Shares of the experts in the tokens of a step: float32 arrays [L, E]."""
    layers: list[int] = field(default_factory=list)
    """Numbers of the layers in `loads`."""
    clock: Series = field(default_factory=Series)
    """(Tokens so far, seconds since 1970) of each record; NaN where a record lacks one."""
    starts: list[Start] = field(default_factory=list)
    samples: list[tuple[int, list[dict[str, str]]]] = field(default_factory=list)
    """(Step, prompts with their completions) of each evaluation that generated text."""
    tasks: tuple[int, list[dict[str, Any]]] | None = None
    """(Step, results) of the last evaluation of downstream tasks. A result has the keys TASK_TEXTS and
    TASK_NUMBERS; None stands for a number that is not known."""
    alerts: list[tuple[int, str, str]] = field(default_factory=list)
    """(Step, name, text)."""
    bad_lines: list[int] = field(default_factory=list)
    """Line numbers, from 1, that hold no record."""

    def add(self, record: dict[str, Any]) -> None:
        """Take up one record. KeyError, TypeError or ValueError if it has no step."""
        step = int(record["step"])
        for name, value in record.items():
            if name in _NOT_METRICS:
                continue
            if isinstance(value, list) and _LOAD.fullmatch(name) is None:
                self._add_list(name, step, value)
            elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                number = math.nan if value is None else float(value)
                self.scalars.setdefault(name, Series()).add(step, number)
        self._add_loads(step, record)
        self._add_time(step, record)
        for sample in _texts(record.get("eval/samples"), ("prompt", "completion")):
            if not self.samples or self.samples[-1][0] != step:
                self.samples.append((step, []))
            self.samples[-1][1].append(sample)
        if results := _task_results(record.get("eval/tasks")):
            self.tasks = (step, results)
        for alert in _texts(record.get("alerts"), ("name", "text")):
            self.alerts.append((step, alert["name"], alert["text"]))

    def _add_list(self, name: str, step: int, value: list[Any]) -> None:
        try:
            values = np.asarray([math.nan if item is None else item for item in value], np.float32)
        except (TypeError, ValueError):
            return  # not numbers
        series = self.lists.setdefault(name, Series())
        if values.ndim == 1 and (not series.values or len(series.values[0]) == len(values)):
            series.add(step, values)

    def _add_loads(self, step: int, record: dict[str, Any]) -> None:
        named = {int(match[1]): name for name in record if (match := _LOAD.fullmatch(name))}
        if not named:
            return
        layers = sorted(named)
        loads_LE = np.asarray([record[named[layer]] for layer in layers], np.float32)
        if self.loads.values and self.loads.values[0].shape != loads_LE.shape:
            return
        self.layers = layers
        self.loads.add(step, loads_LE)

    def _add_time(self, step: int, record: dict[str, Any]) -> None:
        tokens, when = record.get("tokens"), record.get("time")
        self.clock.add(step, tuple(math.nan if value is None else float(value) for value in (tokens, when)))
        resumes = int(record.get("resumes") or 0)
        if not self.starts or self.starts[-1].resumes != resumes:
            self.starts.append(Start(resumes, step, when, step, when))
        self.starts[-1].last_step, self.starts[-1].last_time = step, when


def _texts(value: Any, keys: tuple[str, str]) -> list[dict[str, str]]:
    """The elements of a list of objects that have both keys, as texts."""
    if not isinstance(value, list):
        return []
    good = [item for item in value if isinstance(item, dict) and all(key in item for key in keys)]
    return [{key: str(item[key]) for key in keys} for item in good]


def _task_results(value: Any) -> list[dict[str, Any]]:
    """The elements of a list that are results of tasks."""
    items = value if isinstance(value, list) else []
    return [
        texts | {key: _number(item.get(key)) for key in TASK_NUMBERS}
        for item in items
        for texts in _texts([item], TASK_TEXTS)
    ]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


class RunReader:
    """Reads a run directory, and reads on where its metrics.jsonl has grown."""

    def __init__(self, source: str | Path) -> None:
        """
        Args:
            source: A run directory, or a metrics.jsonl.

        Raises:
            UserError: There is no metrics.jsonl.
        """
        path = Path(source).expanduser()
        self.metrics = path if path.is_file() else path / METRICS
        self.directory = self.metrics.parent
        if not self.metrics.is_file():
            missing = "no such directory" if not path.exists() else f"no {METRICS} there"
            raise UserError(f"source={source}: {missing}; give the run_dir of a training that has logged")
        self.name = self.directory.resolve().name
        self.data = RunData()
        self._offset, self._lines, self._inode = 0, 0, 0

    def update(self) -> bool:
        """Read what is new. Returns whether there was anything.

        A run that resumes replaces the file by one without the records after its checkpoint: then all of it
        is read again. A last line without its end is left for the next call.
        """
        with self.metrics.open("rb") as file:
            about = os.fstat(file.fileno())
            replaced = about.st_ino != self._inode or about.st_size < self._offset
            if replaced:
                self.data, self._offset, self._lines, self._inode = RunData(), 0, 0, about.st_ino
            file.seek(self._offset)
            start = self._offset
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._lines += 1
                self._take(line)
        return replaced or self._offset > start

    def _take(self, line: bytes) -> None:
        try:
            self.data.add(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            self.data.bad_lines.append(self._lines)

    def status(self) -> dict[str, Any]:
        """The content of status.json; empty if it is not there or not readable."""
        return read_object(self.directory / "status.json")

    def config(self) -> dict[str, Any]:
        """The content of config.yaml; empty if it is not there or not readable."""
        path = self.directory / "config.yaml"
        try:
            values = OmegaConf.to_container(OmegaConf.load(path), resolve=False) if path.is_file() else {}
        except Exception:  # YAML and OmegaConf raise a dozen exception types, and a report needs no config
            return {}
        return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is not there, not readable or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested configuration: {"model": {"hidden_size": 1}} is {"model.hidden_size": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unigram_entropy(config: dict[str, Any]) -> float | None:
    """The unigram entropy of the run's data, in nats per token; None: unknown, or there are several sources.

    Args:
        config: config.yaml with dotted keys. The manifest of `data.dir` is read if it is still there.
    """
    directory = config.get("data.dir")
    if not isinstance(directory, str) or config.get("data.mixture") or config.get("data.stages"):
        return None
    value = read_object(Path(directory).expanduser() / MANIFEST).get("unigram_entropy")
    return float(value) if isinstance(value, int | float) else None
