"""One HTML file about one or more runs. It needs no network: script, style and data are inside.

The page is a template, a style sheet, scripts (assets/, with uPlot for the curves) and one JSON object, which
`payload` makes. `olmoe report serve=true` sends the same object again when the run has grown.
"""

import base64
import hashlib
import html
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from olmoe_train import __version__
from olmoe_train.reporting.analysis_tables import analysis_parts
from olmoe_train.reporting.charts import LAYER, PERPLEXITY, SECTIONS, charts_of
from olmoe_train.reporting.downsample import expert_loads, keep_extremes, matrix_over_steps, rounded
from olmoe_train.reporting.health import assess, is_dense, recent
from olmoe_train.reporting.run_data import RunData, RunReader, Series, flatten, unigram_entropy
from olmoe_train.utils.redaction import redact

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = (
    "uplot/uPlot.iife.min.js",
    "core.js",
    "lines.js",
    "heatmap.js",
    "experts.js",
    "panels.js",
    "report.js",
)
STYLES = ("uplot/uPlot.min.css", "report.css")

POINTS, BUCKETS, LOAD_BYTES = 1000, 200, 620_000
"""Of one run: points per curve, columns of a matrix over steps, bytes of the experts' loads before base64.
Several runs share points and bytes."""
LEAST_POINTS = 200
MOST_SAMPLES, MOST_SAMPLE_CHARACTERS, MOST_MARKS = 12, 2000, 300
"""Evaluations with generated text, characters of one text, and skipped steps or alerts in a report."""


def render(readers: Sequence[RunReader], live: bool = False) -> str:
    """The report as one HTML document without any URL.

    Args:
        readers: The runs, each read with `update`.
        live: Whether the page asks its server for new records.
    """
    data = payload(readers) | {"live": live}
    scripts = [_without_urls((ASSETS / name).read_text(encoding="utf-8")) for name in SCRIPTS]
    style = "\n".join(_without_urls((ASSETS / name).read_text(encoding="utf-8")) for name in STYLES)
    script = "\n".join(scripts)
    names = ", ".join(reader.name for reader in readers)
    return Template((ASSETS / "report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{names} - training report"),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        f"connect-src {'&#39;self&#39;' if live else '&#39;none&#39;'}",
        style=style,
        script=script,
        data=embedded(data),
    )


def embedded(data: Any) -> str:
    r"""JSON for a <script> element. Texts of a run cannot end the element, and hold no URL: / is \/ there."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("</", "<\\/").replace("<!--", "\\u003c!--").replace("://", ":\\/\\/")


def _without_urls(source: str) -> str:
    """A license comment names the home page of its project; a report has no URL."""
    return re.sub(r"https?://", "", source)


def _hash(text: str) -> str:
    """The source expression of an inline script or style in a Content-Security-Policy."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"&#39;sha256-{digest}&#39;"


def payload(readers: Sequence[RunReader]) -> dict[str, Any]:
    """Everything that the page shows, as JSON values."""
    runs = [run_values(reader, len(readers)) for reader in readers]
    names = _distinct_names(readers)
    for run, name in zip(runs, names, strict=True):
        run["name"] = name
    scalars = {name for run in runs for name, curve in run["curves"].items() if _is_drawn(name, curve)}
    matrices = {name for run in runs for name in run["matrices"]}
    return {
        "version": __version__,
        "made": round(time.time()),
        "sections": SECTIONS,
        "charts": charts_of(scalars, matrices),
        "runs": runs,
    }


def _is_drawn(name: str, curve: dict[str, Any]) -> bool:
    """Whether a metric has a chart. A task that was evaluated once is in the table of tasks only."""
    return not name.startswith("task/") or len(curve["steps"]) > 1


def _distinct_names(readers: Sequence[RunReader]) -> list[str]:
    """The names of the run directories; with their parents where two are equal."""
    names = [reader.name for reader in readers]
    if len(set(names)) == len(names):
        return names
    longer = [f"{reader.directory.resolve().parent.name}/{reader.name}" for reader in readers]
    return [name if longer.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(longer, 1)]


def run_values(reader: RunReader, runs: int) -> dict[str, Any]:
    """One run of the page.

    Args:
        reader: The run.
        runs: Number of runs of the report, which share the room.
    """
    data, config = reader.data, flatten(redact(reader.config()))
    points, unigram = max(LEAST_POINTS, POINTS // runs), unigram_entropy(config)
    curves, matrices = _curves(data, points), _matrices(data, BUCKETS)
    loads = None
    if data.loads.values and not is_dense(data):
        loads = expert_loads(data.loads, data.layers, BUCKETS, LOAD_BYTES // runs)
    return {
        "health": assess(data, config, reader.status(), unigram),
        "config": {key: _plain(value) for key, value in config.items()},
        "unigram": unigram,
        "records": len(data.clock.steps),
        "points": points,
        "clock": _clock(data, points),
        "curves": curves,
        "summary": {name: _summary(data.scalars[name]) for name in curves if name in data.scalars},
        "matrices": matrices,
        "loads": loads,
        "skipped": _skipped_steps(data),
        "starts": [vars(start) for start in data.starts],
        "samples": _samples(data),
        "tasks": _tasks(data),
        "alerts": [{"step": s, "name": n, "text": t} for s, n, t in data.alerts[-MOST_MARKS:]],
        "bad_lines": data.bad_lines[:10],
        "analysis": analysis_parts(reader.directory),
    }


def _plain(value: Any) -> str | int | float | bool | None:
    """A value of the configuration for a table."""
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def _curves(data: RunData, points: int) -> dict[str, Any]:
    """Metrics that are numbers: {"steps", "values"} by name. Steps are differences to the step before."""
    curves: dict[str, Any] = {}
    for name, series in data.scalars.items():
        of_dense = is_dense(data) and name.startswith("router/")
        if LAYER.fullmatch(name) or of_dense or not np.isfinite(series.values).any():
            continue
        steps, values = keep_extremes(series, points)
        curves[name] = {"steps": np.diff(steps, prepend=0).tolist(), "values": values}
    if (loss := curves.get("train/ce_loss")) is not None:
        exp = [None if value is None else rounded(math.exp(min(value, 700))) for value in loss["values"]]
        curves[PERPLEXITY] = {"steps": loss["steps"], "values": exp}
    return curves


def _summary(series: Series) -> dict[str, float | None]:
    """Numbers that sum a metric up, from all of its records."""
    values = np.asarray(series.values, np.float64)
    finite = values[np.isfinite(values)]
    return {
        "last": rounded(float(values[-1])),
        "least": rounded(float(finite.min())),
        "median": rounded(float(np.median(finite))),
        "recent": rounded(recent(series)),
    }


def _matrices(data: RunData, buckets: int) -> dict[str, Any]:
    """Metrics of the layers by family, as router/layer_NN/entropy, and metrics that are lists."""
    families: dict[str, dict[int, Series]] = {}
    for name, series in data.scalars.items():
        if match := LAYER.fullmatch(name):
            families.setdefault(f"router/layer_NN/{match[2]}", {})[int(match[1])] = series
    matrices = {}
    for name, layers in families.items():
        numbers = sorted(layers)
        steps = layers[numbers[0]].steps
        if any(layers[number].steps != steps for number in numbers):
            continue
        values_NL = np.asarray([layers[number].values for number in numbers], np.float64).T
        if np.isfinite(values_NL).any() and not is_dense(data):
            matrices[name] = matrix_over_steps(steps, values_NL, buckets) | {"labels": numbers}
            if matrices[name]["low"] == matrices[name]["high"]:
                del matrices[name]  # the sum over the layers, such as no dead expert, says it all
    for name, series in data.lists.items():
        if series.values:
            values_NR = np.stack(series.values)
            labels = list(range(values_NR.shape[1]))
            matrices[name] = matrix_over_steps(series.steps, values_NR, buckets) | {"labels": labels}
    return matrices


def _clock(data: RunData, points: int) -> dict[str, Any]:
    """Tokens, and hours since the first record, at some of the steps; the page interpolates between them."""
    records = len(data.clock.steps)
    index: list[int] = np.unique(np.linspace(0, records - 1, min(points, records)).astype(int)).tolist()
    times = [data.clock.values[i][1] for i in index]
    begin = next((when for when in times if not math.isnan(when)), math.nan)
    return {
        "steps": [data.clock.steps[i] for i in index],
        "tokens": [rounded(data.clock.values[i][0]) for i in index],
        "hours": [rounded((when - begin) / 3600) for when in times],
        "begin": None if math.isnan(begin) else begin,
    }


def _skipped_steps(data: RunData) -> list[dict[str, int]]:
    """Records before which steps were skipped: {"step", "count"}."""
    series = data.scalars.get("train/skipped_steps")
    if series is None:
        return []
    counts = np.diff(np.nan_to_num(series.values), prepend=0.0)
    marks = [{"step": series.steps[i], "count": int(counts[i])} for i in np.flatnonzero(counts > 0).tolist()]
    return marks[-MOST_MARKS:]


def _samples(data: RunData) -> list[dict[str, Any]]:
    """The newest generated texts, and those of the first evaluation."""
    chosen = data.samples if len(data.samples) <= MOST_SAMPLES else [
        data.samples[0], *data.samples[1 - MOST_SAMPLES :]
    ]  # fmt: skip
    return [
        {
            "step": step,
            "texts": [{k: v[:MOST_SAMPLE_CHARACTERS] for k, v in text.items()} for text in texts[:8]],
        }
        for step, texts in chosen
    ]


def _tasks(data: RunData) -> dict[str, Any] | None:
    """The last results of the downstream tasks: {"step", "results"}; None: there are none.

    A result also has "at_chance": whether its score is at most two standard errors above that of guessing.
    """
    if data.tasks is None:
        return None
    step, results = data.tasks
    return {"step": step, "results": [result | {"at_chance": _is_at_chance(result)} for result in results]}


def _is_at_chance(result: dict[str, Any]) -> bool:
    score, chance, error = result["score"], result["chance"], result["stderr"] or 0.0
    return score is not None and chance is not None and score <= chance + 2 * error
