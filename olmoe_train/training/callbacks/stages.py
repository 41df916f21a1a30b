"""Stages of the data: says in the log where a stage ends, and which shares its sources had."""

import logging

from olmoe_train.data.loader import TrainingData
from olmoe_train.data.shares import stage_shares
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.state import TrainState

log = logging.getLogger(__name__)


class Stages(Callback):
    """Logs every stage that has ended, and at the end of the run the one that it is in."""

    def __init__(self, data: TrainingData) -> None:
        self.data, self.stages = data, data.samples.stages
        self.current = 0

    def on_start(self, state: TrainState) -> None:
        self.current = self.data.samples.schedule.stage_of(state.samples)
        log.info("data.stages: %s", self._describe(self.current, state.samples))

    def on_step(self, state: TrainState, report: StepReport) -> None:
        now = self.data.samples.schedule.stage_of(state.samples)
        for stage in range(self.current, now):
            log.info("step %d | ended: %s", state.step, self._describe(stage, state.samples))
        self.current = now

    def on_end(self, state: TrainState) -> None:
        log.info("step %d | %s", state.step, self._describe(self.current, state.samples))

    def _describe(self, number: int, samples: int) -> str:
        """The stage, its tokens, and the shares of its sources up to now."""
        stage, length = self.stages[number], self.data.cfg.sequence_length
        end = "the end of the run" if stage.until is None else f"{stage.until * length:,}"
        text = f"stage {number + 1} of {len(self.stages)}, tokens {stage.first * length:,} to {end}"
        shares = stage_shares(self.data.samples, stage, samples)
        names = stage.requested_shares()
        if not stage.overlap(samples):
            return f"{text}: {', '.join(f'{name} {share:.2%}' for name, share in names.items())} requested"
        parts = [
            f"{name} {shares[name]['stage_share']:.2%} ({requested:.2%} requested)"
            for name, requested in names.items()
        ]
        return f"{text}: {', '.join(parts)}"
