"""Saves checkpoints: every checkpoint.every steps, for exports, and where the loop ends."""

from collections.abc import Callable
from typing import Any

from olmoe_train.checkpoint.saver import Saver
from olmoe_train.optim.skip_step import SkipGuard
from olmoe_train.run.directory import Run
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.state import TrainState
from olmoe_train.training.throughput import Throughput


class Checkpoints(Callback):
    def __init__(
        self,
        saver: Saver,
        run: Run,
        guard: SkipGuard,
        throughput: Throughput,
        saved_state: Callable[[TrainState], dict[str, Any]],
    ) -> None:
        """saved_state: the JSON values that a checkpoint of this position holds; collective."""
        self.saver, self.run, self.guard, self.throughput = saver, run, guard, throughput
        self.saved_state = saved_state

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if not (report.is_last or self.saver.due(state.step)):
            return
        self.guard.check(state.step)
        self.saver.save(state.step, self.saved_state(state), stopping=self.run.stopping)
        self.run.agree_to_stop()  # a signal during the save ends the loop here: no later step is saved again
        self.throughput.restart(state.tokens)

    def on_end(self, state: TrainState) -> None:
        self.saver.finish()
        self.run.saved_step = self.saver.saved_step

    def must_stop(self) -> bool:
        return self.saver.must_abort()
