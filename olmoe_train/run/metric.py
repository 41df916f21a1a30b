"""What the registry says of a metric; run/metrics_registry.py lists the metrics."""

from dataclasses import dataclass
from enum import Enum

from olmoe_train.run.metric_alarms import Alarm


class Better(Enum):
    """Which values of a metric are better."""

    lower = "lower"
    higher = "higher"
    neither = "neither"


class Group(Enum):
    """Sections of the documentation's page, in their order."""

    progress = "Progress"
    loss = "Loss"
    preferences = "Preferences"
    rewards = "Verified rewards"
    router = "Router"
    experts = "Experts"
    data = "Data"
    performance = "Speed and memory"
    health = "Health"
    validation = "Evaluation"

    @property
    def section(self) -> str:
        """The section of dashboards that shows the group: one of SECTIONS."""
        if self in (Group.preferences, Group.rewards):
            return "Fine-tuning"
        return Group.health.value if self is Group.progress else self.value


SECTIONS = (
    "Loss",
    "Router",
    "Experts",
    "Data",
    "Speed and memory",
    "Health",
    "Fine-tuning",
    "Evaluation",
)
"""Sections of dashboards, in their order."""


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of metrics whose names differ in a part."""

    name: str
    """As in metrics.jsonl. NAME stands for a part without a slash, NN for two digits."""
    unit: str
    meaning: str
    """One or two sentences in Markdown. Links are relative to docs/reference/."""
    group: Group
    better: Better = Better.neither
    console: str | None = None
    """How the console shows the value, a format such as "ce {:.4f}". None: the console does not show it."""
    alarm: Alarm | None = None

    @property
    def summary(self) -> str:
        """What sums a run up: its least or its greatest value (min, max), or the last one.

        The best value is that of losses and of validation. Other metrics, such as dead experts, matter as
        they are at the end.
        """
        if self.name.endswith(("loss", "perplexity")):
            return "min"
        if self.group is not Group.validation:
            return "last"
        return {Better.lower: "min", Better.higher: "max", Better.neither: "last"}[self.better]
