"""Validation before the first step, every evaluation.every steps, and after the run's last step."""

import logging
from typing import Any

from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.run.loggers import MetricsLog
from olmoe_train.run.metrics_registry import shown
from olmoe_train.run.watchdog import Watchdog
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.objectives.base import Objective, Validation
from olmoe_train.training.state import TrainState
from olmoe_train.training.throughput import Throughput

log = logging.getLogger(__name__)


class Evaluate(Callback):
    """What the objective measures on the validation splits: eval/NAME/loss and more."""

    def __init__(
        self,
        cfg: EvaluationConfig,
        data: TrainingData,
        model: OlmoeForCausalLM,
        objective: Objective,
        metrics: MetricsLog,
        throughput: Throughput,
        watchdog: Watchdog,
    ) -> None:
        self.cfg, self.data, self.model, self.objective = cfg, data, model, objective
        self.metrics, self.throughput, self.watchdog = metrics, throughput, watchdog
        self.has_data = any(manifest.validation.tokens for manifest in data.manifests.values())

    def on_start(self, state: TrainState) -> None:
        if not self.has_data:
            log.warning("WARNING: the data has no validation split, so eval/* is not measured")
        if state.step == 0 and self.cfg.at_start:
            self._evaluate(state)

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if state.step == state.last_step or (self.cfg.every and state.step % self.cfg.every == 0):
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        if not self.has_data:
            return
        results = self.objective.validate(self.model, self.data, self.cfg, self.watchdog.with_heartbeat)
        self._log(state, results)
        self.throughput.restart(state.tokens)

    def _log(self, state: TrainState, results: dict[str, Validation]) -> None:
        values: dict[str, Any] = {"step": state.step, "tokens": state.tokens}
        for name, result in results.items():
            of_set = {f"eval/{name}/{key}": value for key, value in result.values.items()}
            parts = [text for key, value in of_set.items() if (text := shown(key, value)) is not None]
            log.info(" | ".join([f"step {state.step}", f"{name} {parts[0]}", *parts[1:], result.count]))
            values |= of_set
        self.metrics.write(values)
        shares = self.data.samples.shares(state.samples) if self.data.cfg.mixture else {}
        for name, share in shares.items():
            log.info(
                f"step {state.step} | {name}: {share['share']:.2%} of the tokens so far, "
                f"{share['requested_share']:.2%} requested | {share['epochs']:.3f} epochs"
            )
