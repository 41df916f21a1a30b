"""Saves checkpoints: every checkpoint.every steps, for exports, and where the loop ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from olmoe_train.checkpoint.saver import Saver
from olmoe_train.optim.skip_step import SkipGuard
from olmoe_train.run.directory import Run
from olmoe_train.run.loggers import MetricsLog
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
        metrics: MetricsLog,
        saved_state: Callable[[TrainState], dict[str, Any]],
    ) -> None:
        """saved_state: the JSON values that a checkpoint of this position holds; collective."""
        self.saver, self.run, self.guard, self.throughput = saver, run, guard, throughput
        self.metrics, self.saved_state = metrics, saved_state

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if not (report.is_last or self.saver.due(state.step)):
            return
        self.guard.check(state.step)
        with self._alert_of_failure():
            self.saver.save(state.step, self.saved_state(state), stopping=self.run.stopping)
        self.run.agree_to_stop()  # a signal during the save ends the loop here: no later step is saved again
        self.throughput.restart(state.tokens)

    def on_end(self, state: TrainState) -> None:
        with self._alert_of_failure():
            self.saver.finish()
        self.run.saved_step = self.saver.saved_step

    def must_stop(self) -> bool:
        self._alert()  # of a save in the background
        return self.saver.must_abort()

    @contextmanager
    def _alert_of_failure(self) -> Iterator[None]:
        """Alert if a save has failed by the end of the block, however the block ends."""
        try:
            yield
        finally:
            self._alert()

    def _alert(self) -> None:
        if self.saver.failure is not None:
            self.metrics.alert("failed save", f"saving failed: {self.saver.failure}")
