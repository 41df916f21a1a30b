"""Which panels show what runs have logged: one for each metric or family of metrics, in the registry's
sections.

A family is the metrics whose names differ in a layer (NN), or in a source, a validation split or a task
(NAME).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from olmoe_train.config.choices import XAxis
from olmoe_train.run.metric import SECTIONS, Better, Metric
from olmoe_train.run.metrics_registry import METRICS, find_metric, section_of

OTHER = "Other"
"""Section of numbers that no metric of the registry has, such as those of a callback of one's own."""
COMPARISON = "Comparison"
ALL_SECTIONS = (COMPARISON, *SECTIONS, OTHER)
"""In their order."""


class Kind(Enum):
    """What a panel draws."""

    lines = "lines"
    pictures = "pictures"
    histograms = "histograms"
    table = "table"
    run_differences = "run_differences"


@dataclass(frozen=True)
class Panel:
    """One panel, without a word of a particular dashboard's format."""

    section: str
    title: str
    kind: Kind = Kind.lines
    keys: tuple[str, ...] = ()
    """Names in wandb. Empty with a pattern."""
    pattern: str | None = None
    """Regular expression of the names in wandb that a panel of lines shows: all layers, sources, splits
    or tasks."""
    y_label: str | None = None
    """Unit, and which values are better."""


@dataclass(frozen=True)
class Combined:
    """Lines of several metrics in one panel, wherever a run has at least two of them."""

    section: str
    title: str
    names: tuple[str, ...]
    """Names in the registry. A metric whose own section this is has no other panel."""


COMBINED = (
    Combined(
        "Loss",
        "Loss in training and validation",
        ("train/ce_loss", "train/preference_loss", "train/policy_loss", "eval/NAME/loss"),
    ),
    Combined("Data", "Shares of the sources", ("data/NAME/share", "data/NAME/requested_share")),
    Combined("Data", "Shares in the stage", ("data/NAME/stage_share", "data/NAME/requested_stage_share")),
    Combined("Fine-tuning", "Rewards", ("rewards/chosen", "rewards/rejected")),
    Combined("Fine-tuning", "Rewards per token", ("rewards_per_token/chosen", "rewards_per_token/rejected")),
    Combined("Fine-tuning", "Log-probabilities", ("logps/chosen", "logps/rejected")),
    Combined(
        "Fine-tuning", "Log-probabilities per token", ("logps_per_token/chosen", "logps_per_token/rejected")
    ),
)

RICH: dict[str, tuple[Panel, ...]] = {
    "router/layer_NN/load": (
        Panel("Router", "Load of the experts, layers x experts", Kind.pictures, ("router/load_map",)),
        Panel(
            "Experts", "Histogram of the experts' loads, layer NN", Kind.histograms, ("router/layer_NN/load",)
        ),
    ),
    "train/loss_by_position": (
        Panel("Loss", "Loss by position", Kind.histograms, ("train/loss_by_position",)),
    ),
    "eval/NAME/loss_by_position": (
        Panel("Evaluation", "Loss by position, NAME", Kind.histograms, ("eval/NAME/loss_by_position",)),
    ),
    "eval/samples": (Panel("Evaluation", "Samples", Kind.table, ("eval/samples",)),),
    "eval/tasks": (Panel("Evaluation", "Tasks", Kind.table, ("eval/tasks",)),),
}
"""Metrics that are lists in metrics.jsonl, by their families, and what wandb gets of them."""
_FLOW = Panel("Router", "Flow of tokens between experts", Kind.pictures, ("router/flow",))
"""Of a model with at least two layers of experts."""


def panels_by_section(
    numbers: Iterable[str], lists: Iterable[str], x_axis: XAxis, compares: bool
) -> dict[str, list[Panel]]:
    """The panels of each section that has any, in the order of the sections.

    Args:
        numbers: Names of the numbers in metrics.jsonl.
        lists: Names of the lists that wandb has as pictures, histograms or tables.
        x_axis: Horizontal axis; its own values have no panel.
        compares: Whether there are several runs; their differences in configuration then have a panel.
    """
    families: dict[str, list[str]] = {}
    for name in sorted(set(numbers) - {x_axis.value}, key=_registry_order):
        families.setdefault(family_of(name), []).append(name)
    panels = [Panel(COMPARISON, "Differences between the runs", Kind.run_differences)] if compares else []
    covered: set[str] = set()
    for combined in COMBINED:
        found = [family for family in combined.names if family in families]
        if len(found) > 1:
            keys = tuple(name for family in found for name in families[family])
            panels.append(Panel(combined.section, combined.title, keys=keys, y_label=_y_label(found[0])))
            covered |= {family for family in found if section_of(_example(family)) == combined.section}
    panels += [_lines(family, tuple(names)) for family, names in families.items() if family not in covered]
    rich = [panel for name in sorted(lists) for panel in _rich_panels(name)]
    panels += list(dict.fromkeys(rich))
    panels += [_FLOW] if "router/layer_01/load" in lists else []
    sections = {section: [p for p in panels if p.section == section] for section in ALL_SECTIONS}
    return {section: found for section, found in sections.items() if found}


def shows(panel: Panel, key: str) -> bool:
    """Whether a panel shows the values that wandb has under a key."""
    return key in panel.keys or (panel.pattern is not None and re.search(panel.pattern, key) is not None)


def family_of(name: str) -> str:
    """The family of a name in metrics.jsonl: router/layer_NN/load of router/layer_07/load.

    The family of eval/web/rewards/margins is eval/NAME/rewards/margins. A metric that has no family, and a
    name that is no metric's, is its own.
    """
    metric = find_metric(name)
    if metric is not None and metric.name in RICH:
        return metric.name
    if metric is not None and name.startswith("eval/"):
        return re.sub("^eval/[^/]+", "eval/NAME", name)
    return name if metric is None else metric.name


def _example(family: str) -> str:
    return family.replace("NAME", "x").replace("NN", "00")


def _registry_order(name: str) -> tuple[int, str]:
    """The registry's order, then by name: layers and sources follow each other."""
    metric = find_metric(name)
    return (len(METRICS) if metric is None else METRICS.index(metric), name)


def _lines(family: str, names: tuple[str, ...]) -> Panel:
    """The panel of lines of a metric, or of all metrics of a family."""
    section = section_of(names[0]) or OTHER
    if family in names:
        return Panel(section, family, keys=names, y_label=_y_label(family))
    pattern = re.escape(family).replace("NAME", "[^/]+").replace("NN", "[0-9]+")
    title = family.replace("NAME", "*").replace("NN", "*")
    return Panel(section, title, pattern=f"^{pattern}$", y_label=_y_label(family))


def _rich_panels(name: str) -> list[Panel]:
    """What wandb has of a list of metrics.jsonl."""
    layer, split = re.search("layer_([0-9]{2})/", name), re.match("eval/([^/]+)/", name)

    def named(text: str) -> str:
        text = text.replace("NN", layer[1]) if layer else text
        return text.replace("NAME", split[1]) if split else text

    return [
        Panel(panel.section, named(panel.title), panel.kind, tuple(named(key) for key in panel.keys))
        for panel in RICH.get(family_of(name), ())
    ]


def _y_label(family: str) -> str | None:
    metric: Metric | None = find_metric(_example(family))
    if metric is None:
        return None
    unit = "" if metric.unit == "none" else metric.unit.replace("`", "")
    direction = "" if metric.better is Better.neither else f"{metric.better.value} is better"
    return ", ".join(part for part in (unit, direction) if part) or None
