"""Warns of stragglers on steps that are logged (run/stragglers.py)."""

from olmoe_train.run.stragglers import StragglerDetector
from olmoe_train.training.batch import StepBatches
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.state import TrainState


class Stragglers(Callback):
    def __init__(self, detector: StragglerDetector, batches: StepBatches) -> None:
        self.detector, self.batches = detector, batches

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if report.is_logged:
            self.detector.warn(self.batches.seconds_waited)
