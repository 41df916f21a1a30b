"""The table of a sweep: runs that differ in a few keys, and over seeds the mean and its spread.

A row is one combination of the values that vary, the seed left out. Loss: of the last validation. Violation:
mean of router/max_violation over the last fifth of the logged steps, as one step's value is one batch's
noise. Seconds per step: median over the logged steps, validation and saves left out.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe_train.reporting.run_data import METRICS, RunData, RunReader, read_object

RUNS, TABLE = "sweep.json", "sweep.md"
"""Files of a sweep: the values of each run by the name of its directory, and the table in Markdown."""
SEED = "seed"
RECENT = 5
"""The violation is a mean over 1 / RECENT of the logged steps."""
COLUMNS = ("validation loss", "max violation", "seconds per step")


@dataclass(frozen=True)
class Result:
    """What the table shows of a run; NaN: the run has not logged the value."""

    loss: float
    violation: float
    step_seconds: float


def sweep_table(directory: Path) -> str:
    """The table of all runs that sweep.json names, as Markdown: a row per combination, ± over its seeds.

    ± is the standard deviation of a single run, as statistics.stdev computes it. The best loss comes first.
    A run that is not done has no part in its row, and is listed under the table.
    """
    runs: dict[str, Any] = read_object(directory / RUNS)
    rows: dict[tuple[tuple[str, str], ...], list[Result]] = {}
    unfinished = []
    for name, run in runs.items():
        values = tuple((key, value) for key, value in run["values"].items() if key != SEED)
        results = rows.setdefault(values, [])
        if read_object(directory / name / "status.json").get("state") == "done":
            results.append(read_result(directory / name))
        else:
            unfinished.append(name)
    keys = list(dict.fromkeys(key for row in rows for key, _ in row))
    lines = [
        table_line([*keys, "runs", *COLUMNS]),
        table_line([":--"] * len(keys) + ["--:"] * (1 + len(COLUMNS))),
    ]
    done = [(dict(row), results) for row, results in rows.items() if results]
    for row, results in sorted(done, key=lambda item: _order(item[1])):
        columns = zip(*((r.loss, r.violation, r.step_seconds) for r in results), strict=True)
        cells = [spread(column) for column in columns]
        lines.append(table_line([*(row.get(key, "") for key in keys), str(len(results)), *cells]))
    return "\n".join([*lines, *(f"\nNot done: {name}" for name in unfinished)])


def read_result(run_dir: Path) -> Result:
    """The values of one run, from its metrics.jsonl."""
    if not (run_dir / METRICS).is_file():
        return Result(math.nan, math.nan, math.nan)
    reader = RunReader(run_dir)
    reader.update()
    data = reader.data
    violations = data.scalars["router/max_violation"].values if "router/max_violation" in data.scalars else []
    recent = violations[-max(1, len(violations) // RECENT) :]
    losses = data.scalars["eval/validation/loss"].values if "eval/validation/loss" in data.scalars else []
    return Result(
        losses[-1] if losses else math.nan,
        statistics.fmean(recent) if recent else math.nan,
        _median_step_seconds(data),
    )


def _median_step_seconds(data: RunData) -> float:
    speed = data.scalars.get("perf/tokens_per_second")
    if speed is None:
        return math.nan
    tokens_at = {step: tokens for step, (tokens, _) in zip(data.clock.steps, data.clock.values, strict=True)}
    seconds, before_step, before_tokens = [], 0, 0.0
    for step, rate in zip(speed.steps, speed.values, strict=True):
        if step > before_step and rate > 0:
            seconds.append((tokens_at[step] - before_tokens) / (step - before_step) / rate)
        before_step, before_tokens = step, tokens_at[step]
    return statistics.median(seconds) if seconds else math.nan


def _order(results: list[Result]) -> float:
    loss = statistics.fmean(result.loss for result in results)
    return math.inf if math.isnan(loss) else loss


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation of one value; the mean alone if there is one value, nothing if one is NaN."""
    if any(math.isnan(value) for value in values):
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table_line(cells: list[str]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"
