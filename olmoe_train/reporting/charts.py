"""Which charts a report has, from the names of the metrics that its runs logged and the registry of metrics.

A metric that the registry gains gets a chart in the section of its group without a change here.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from olmoe_train.run.metric import Group, Metric
from olmoe_train.run.metrics_registry import METRICS, find_metric

PERPLEXITY = "train/perplexity"
"""exp(train/ce_loss): derived here, not logged."""
OTHER = "Other"
"""Section of the metrics that the registry does not list, such as those of a newer version."""
SECTIONS = [group.value for group in Group] + [OTHER]
LAYER = re.compile(r"router/layer_(\d+)/(.+)")
_OVER_LAYERS = re.compile(r"[.;] The (maximum|mean|sum) over layers$")
_TRAINING_LOSSES = ("train/ce_loss", "train/preference_loss", "train/policy_loss", "train/loss")
"""The objective's loss without the router's; a run has the first of these that it logs."""
_UNIGRAM = "guessing by frequency"
_ORDER = [metric.name for metric in METRICS]

TITLES = {
    "train/loss": "Total loss",
    "train/load_balancing_loss": "Load-balancing loss",
    "train/router_z_loss": "Router z-loss",
    "train/grad_norm": "Gradient norm",
    "train/lr": "Learning rate",
    "perf/tokens_per_second": "Throughput",
    "perf/mfu": "Model FLOPs utilization (MFU)",
    "perf/peak_memory_gib": "Peak memory",
    "router/max_violation": "Busiest expert, above its fair share",
    "router/entropy": "Router entropy",
    "router/dead_experts": "Dead experts",
    "router/layer_NN/z": "Router z-loss",
    "router/layer_NN/saturation": "Router saturation",
    "data/NAME/share": "Mixture: achieved and requested shares",
    "data/NAME/stage_share": "Stages: achieved and requested shares in each",
    "data/NAME/loss": "Loss of each source",
    "task/NAME/acc": "Tasks: accuracy",
    "task/NAME/acc_per_token": "Tasks: accuracy, per token",
    "task/NAME/acc_per_char": "Tasks: accuracy, per character",
    "task/NAME/acc_per_byte": "Tasks: accuracy, per byte",
    "task/NAME/ce": "Tasks: cross-entropy of the right choice",
    "task/NAME/bits_per_byte": "Tasks: bits per byte of the right choice",
    "kl": "KL divergence",
    "reward_std": "Standard deviation of rewards",
}

REQUESTED = {
    "data/NAME/share": "data/NAME/requested_share",
    "data/NAME/stage_share": "data/NAME/requested_stage_share",
}
"""Achieved share -> requested share, a dashed line in its chart."""


@dataclass
class Line:
    """One metric of a chart."""

    metric: str
    label: str
    dashed: bool = False


@dataclass
class Chart:
    """Lines over steps, or a matrix over steps."""

    id: str
    section: str
    title: str
    unit: str
    meaning: str
    better: str = "neither"
    kind: str = "lines"
    """lines or matrix."""
    lines: list[Line] = field(default_factory=list)
    rows: str = ""
    """Of a matrix: what a row is."""
    unigram: str = ""
    """Label of the horizontal line of the unigram entropy; empty: none."""
    exp_unigram: bool = False
    skipped: bool = False
    """Whether skipped steps are marked."""
    log: bool = False
    """Whether the axis is logarithmic at first."""


def charts_of(scalars: set[str], matrices: set[str]) -> list[dict[str, Any]]:
    """The charts of all runs, in the order of the sections.

    Args:
        scalars: Names of the metrics that are numbers, and PERPLEXITY.
        matrices: Names of the metrics that are lists, and the families of layers as router/layer_NN/entropy.
    """
    charts = [chart for chart in (_loss(scalars), _perplexity(scalars)) if chart.lines]
    used = {line.metric for chart in charts for line in chart.lines}
    for name in sorted(scalars - used, key=_order):
        metric = find_metric(name)
        template = metric.name if metric is not None else name
        if template in REQUESTED.values():
            continue  # drawn with the achieved share
        found = next((chart for chart in charts if chart.id == template), None)
        if found is None:
            charts.append(found := _chart(template, metric))
        found.lines.append(Line(name, _label(name, template), dashed=name.startswith("eval/")))
    for chart in charts:
        _add_requested(chart, scalars)
    for name in sorted(matrices):
        charts.append(_matrix(name))
    return [asdict(chart) for chart in sorted(charts, key=lambda chart: SECTIONS.index(chart.section))]


def _order(name: str) -> tuple[int, str]:
    """The order of the registry, and the alphabet within a family."""
    metric = find_metric(name)
    return (_ORDER.index(metric.name) if metric is not None else len(_ORDER), name)


def _loss(scalars: set[str]) -> Chart:
    training = next((name for name in _TRAINING_LOSSES if name in scalars), None)
    lines = [Line(training, "training")] if training is not None else []
    lines += [Line(name, name.split("/")[1], True) for name in sorted(scalars) if _is_eval(name, "loss")]
    is_cross_entropy = training == "train/ce_loss"
    return Chart(
        "loss",
        Group.loss.value,
        "Cross-entropy" if is_cross_entropy else "Loss",
        "nats per target token" if is_cross_entropy else "",
        "Training loss over the whole global batch, and validation loss. Lower is better.",
        "lower",
        lines=lines,
        unigram=_UNIGRAM if is_cross_entropy else "",
    )


def _perplexity(scalars: set[str]) -> Chart:
    lines = [Line(PERPLEXITY, "training")] if PERPLEXITY in scalars else []
    lines += [
        Line(name, name.split("/")[1], True) for name in sorted(scalars) if _is_eval(name, "perplexity")
    ]
    meaning = "exp(cross-entropy): among how many equally likely tokens the model hesitates. Lower is better."
    return Chart(
        "perplexity", Group.loss.value, "Perplexity", "tokens", meaning, "lower",
        lines=lines, unigram=_UNIGRAM, exp_unigram=True, log=True,
    )  # fmt: skip


def _is_eval(name: str, what: str) -> bool:
    return re.fullmatch(rf"eval/[^/]+/{what}", name) is not None


def _chart(template: str, metric: Metric | None) -> Chart:
    if metric is None:
        return Chart(template, OTHER, _title(template), "", "Not in this version's registry of metrics.")
    return Chart(
        template,
        metric.group.value,
        _title(template),
        "" if metric.unit == "none" else metric.unit,
        _plain(metric.meaning),
        metric.better.value,
        skipped=template in ("train/grad_norm", "train/skipped_steps"),
    )


def _matrix(name: str) -> Chart:
    """A family of layers, or a metric that is a list."""
    metric = find_metric(name.replace("_NN/", "_00/"))
    chart = _chart(name, metric)
    chart.kind = "matrix"
    chart.lines = [Line(name, name)]
    if "_NN/" in name:
        whole = find_metric(name.replace("layer_NN/", ""))
        chart.rows = "layer"
        chart.title = f"{_title(whole.name if whole else name)}, by layer"
        chart.meaning = _plain(_OVER_LAYERS.sub("", whole.meaning)) if whole else chart.meaning
    elif name.endswith("by_position"):
        chart.rows = "position bucket"
    else:
        chart.rows = "element"
    return chart


def _add_requested(chart: Chart, scalars: set[str]) -> None:
    if chart.id not in REQUESTED:
        return
    for line in list(chart.lines):
        requested = f"{line.metric.rpartition('/')[0]}/{REQUESTED[chart.id].rpartition('/')[2]}"
        if requested in scalars:
            chart.lines.append(Line(requested, f"{line.label}, requested", dashed=True))


def _title(template: str) -> str:
    """A title for people. The name of the metric is shown beside it."""
    if template in TITLES:
        return TITLES[template]
    words = re.sub(r"(train|eval|data|router|perf|layer_NN|NAME)/", "", template)
    words = words.replace("NAME", "").replace("/", ", ").replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _label(name: str, template: str) -> str:
    """What distinguishes a metric within its chart."""
    if name.startswith("eval/"):
        return name.split("/")[1]
    if "NAME" in template:
        start = template.index("NAME")
        return name[start:].split("/")[0]
    return "training" if name.startswith(("train/", "rewards", "logps")) else name


def _plain(markdown: str) -> str:
    """The text of a registry's meaning without links; `code` stays marked by backticks."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", markdown)
    return text[:1].upper() + text[1:]
