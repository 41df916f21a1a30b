"""Alarms: which values and events a run tells people of, each once in the whole run.

The registry says which metrics have an alarm, and `logging.alarms` where it begins. An event, such as a save
that failed, has no metric; its callback calls MetricsLog.alert.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from olmoe_train.config.train import AlarmsConfig
from olmoe_train.run.metrics_registry import METRICS
from olmoe_train.utils.files import atomic_write_text

log = logging.getLogger(__name__)
COLLAPSED_VIOLATION = 0.75
"""Default alarm of router/max_violation, as a part of its greatest value, E / K - 1."""
COLLAPSED_ENTROPY = 0.05
"""Default alarm of router/entropy, as a part of its greatest value, ln(E)."""


@dataclass(frozen=True)
class Alert:
    """Something that people should know of, once."""

    name: str
    """What makes it the same thing as an earlier alert."""
    text: str


def thresholds(cfg: AlarmsConfig, num_experts: int, top_k: int) -> dict[str, float]:
    """Threshold of each alarm by its field in `logging.alarms`, with the defaults for this router."""
    violation, entropy = cfg.max_violation, cfg.entropy
    if violation is None:
        violation = COLLAPSED_VIOLATION * (num_experts / top_k - 1)
    if entropy is None:
        entropy = COLLAPSED_ENTROPY * math.log(num_experts)
    return asdict(cfg) | {"max_violation": violation, "entropy": entropy}


class MetricAlarms:
    """Compares the records of one start with the thresholds."""

    def __init__(self, cfg: AlarmsConfig, num_experts: int, top_k: int) -> None:
        self._limits = thresholds(cfg, num_experts, top_k)
        self._collapse_steps = cfg.collapse_steps
        self._since: dict[str, int] = {}  # name of the metric -> first step of those beyond the threshold

    def check(self, values: dict[str, Any]) -> list[Alert]:
        """The alerts of one record. Those of an earlier record come again, as long as they hold.

        Args:
            values: Metrics by name.
        """
        found, step = [], values["step"]
        for metric in METRICS:
            alarm, value = metric.alarm, values.get(metric.name)
            if alarm is None or value is None:
                continue
            limit = self._limits[alarm.key]
            if not (value > limit if alarm.is_above else value < limit):
                self._since.pop(metric.name, None)
                continue
            steps = step - self._since.setdefault(metric.name, step)
            if steps >= self._collapse_steps or not alarm.is_lasting:
                found.append(Alert(alarm.name, f"step {step}: {alarm.text.format(value=value)}"))
        return found


class AlertsOfRun:
    """Which alerts a run has had, in all its starts; kept in run_dir/alerts.json."""

    def __init__(self, path: Path, records: list[dict[str, Any]]) -> None:
        """
        Args:
            path: alerts.json.
            records: Those of metrics.jsonl. Alerts that are in none of them go into the next one.
        """
        self._path = path
        self._alerts: dict[str, dict[str, str]] = {}
        try:
            self._alerts = {one["name"]: one for one in json.loads(path.read_text(encoding="utf-8"))}
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError) as error:
            log.warning("warning: %s cannot be read (%s): alerts may come a second time", path, error)
        recorded = {one["name"] for record in records for one in record.get("alerts", [])}
        self._unrecorded = [one for name, one in self._alerts.items() if name not in recorded]

    def add(self, name: str, text: str) -> bool:
        """Keep an alert; whether it is the first of its name."""
        if name in self._alerts:
            return False
        self._alerts[name] = {"name": name, "text": text}
        self._unrecorded.append(self._alerts[name])
        atomic_write_text(self._path, json.dumps(list(self._alerts.values()), indent=1) + "\n")
        return True

    def take_unrecorded(self) -> list[dict[str, str]]:
        """The alerts that no record has yet, for the record that is written now."""
        taken, self._unrecorded = self._unrecorded, []
        return taken
