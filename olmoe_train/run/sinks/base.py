"""The sink seam: where a run's records go besides metrics.jsonl.

A new sink is one file here, one entry in loggers.py and one option of `logging`. A sink may raise at any
call: MetricsLog then drops it.
"""

import re
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

_LOAD = re.compile("router/layer_[0-9]{2}/load")


@dataclass(frozen=True)
class Record:
    """One record of metrics.jsonl, with what only pictures show."""

    values: dict[str, Any]
    """As in metrics.jsonl: numbers, None, lists. NaN and infinity are None."""
    has_details: bool = False
    """Whether the record is of a step of logging.details_every, whose pictures are drawn."""
    flow_LEE: Tensor | None = None
    """Routing flow, fp32 [L - 1, E, E]: tokens by their first choice in a layer and in the next one."""

    @property
    def step(self) -> int:
        step: int = self.values["step"]
        return step

    @property
    def numbers(self) -> dict[str, float]:
        """The values that are single numbers."""
        return {name: value for name, value in self.values.items() if isinstance(value, int | float)}

    @property
    def loads(self) -> list[list[float]]:
        """[L][E]: share of each expert in the tokens of the step. Empty in a record without them, and of a
        dense model."""
        names = sorted(name for name in self.values if _LOAD.fullmatch(name))
        return [self.values[name] for name in names if len(self.values[name]) > 1]


class Sink(Protocol):
    """Takes the records of one start of a run, on rank 0."""

    name: str
    """As in messages."""

    def write(self, record: Record) -> None:
        """Take a record. Steps do not decrease."""

    def alert(self, name: str, text: str) -> None:
        """Tell people of something that a run has once.

        Args:
            name: Short and unique within the run.
            text: One or two sentences.
        """

    def close(self) -> None:
        """Write what is left. Nothing is called afterwards."""
