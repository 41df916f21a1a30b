"""The callback seam: what happens between optimizer steps.

training/build.py lists the callbacks of a run in their order. A callback cannot change a step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmoe_train.training.batch import Totals
from olmoe_train.training.engine.base import StepOutcome
from olmoe_train.training.metrics import StepTerms
from olmoe_train.training.state import TrainState


@dataclass(frozen=True)
class StepReport:
    """What is known of an optimizer step that was just taken."""

    totals: Totals
    terms: StepTerms
    outcome: StepOutcome
    is_logged: bool
    is_last: bool
    """Whether the loop ends after this step: the run is complete, or must stop here."""


class Callback:
    """Every hook does nothing unless overridden. Every rank calls the hooks in the same order."""

    name = ""
    """Key of the callback's state in checkpoints; needed where there is a state."""

    def on_start(self, state: TrainState) -> None:
        """Before the first step of this process."""

    def on_step(self, state: TrainState, report: StepReport) -> None:
        """After each step. state: includes the step."""

    def on_save(self, checkpoint: Path) -> None:
        """After a checkpoint is complete: on rank 0, in the thread that saved it, possibly steps later."""

    def on_end(self, state: TrainState) -> None:
        """After the last step of this process; not called when the run fails."""

    def must_stop(self) -> bool:
        """Whether the run has to stop after the next step; asked before each step on every rank."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps for the callback; collective."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned in an earlier process; called before on_start."""
