"""Warns of stragglers on steps that are logged (run/stragglers.py)."""

from olmoe_train.run.loggers import MetricsLog
from olmoe_train.run.stragglers import StragglerDetector
from olmoe_train.training.batch import StepBatches
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.state import TrainState


class Stragglers(Callback):
    def __init__(self, detector: StragglerDetector, batches: StepBatches, metrics: MetricsLog) -> None:
        self.detector, self.batches, self.metrics = detector, batches, metrics

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if report.is_logged:
            for rank, text in self.detector.warn(self.batches.seconds_waited):
                self.metrics.alert(f"straggler: rank {rank}", f"step {state.step}: {text}")
