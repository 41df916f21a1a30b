"""Logging: metrics.jsonl, wandb and the console line, every trainer.log_every steps."""

import logging
from typing import Any

import torch

from olmoe_train.config.train import AlarmsConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.mixture import has_sources
from olmoe_train.data.shares import source_shares, stage_shares
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.optim.skip_step import SkipGuard
from olmoe_train.run.alarms import MetricAlarms
from olmoe_train.run.directory import Run
from olmoe_train.run.loggers import MetricsLog
from olmoe_train.run.metrics_registry import METRICS, find_metric, shown
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.details import StepDetails
from olmoe_train.training.engine.base import Engine
from olmoe_train.training.metrics import DataCounts, ExpertUse, metric_name, read_step
from olmoe_train.training.objectives.base import Objective
from olmoe_train.training.state import TrainState
from olmoe_train.training.throughput import Throughput

log = logging.getLogger(__name__)


class Logging(Callback):
    """Reads the step's values from the device, which waits for it, and writes them everywhere."""

    name = "logging"

    def __init__(
        self,
        run: Run,
        metrics: MetricsLog,
        throughput: Throughput,
        engine: Engine,
        objective: Objective,
        guard: SkipGuard,
        data: TrainingData,
        details: StepDetails,
        *,
        dead_expert_steps: int,
        alarms: AlarmsConfig,
        device: torch.device,
    ) -> None:
        self.run, self.metrics, self.throughput = run, metrics, throughput
        self.engine, self.objective, self.guard, self.data = engine, objective, guard, data
        self.details, self.counts = details, DataCounts(data.cfg)
        self._config, self._dead_after, self._device = engine.model.config, dead_expert_steps, device
        self.experts = self._expert_use(None)
        self.alarms = MetricAlarms(alarms, self._config.num_experts, self._config.num_experts_per_tok)

    def on_start(self, state: TrainState) -> None:
        self.details.prepare(state.step + 1, state.samples)

    def on_step(self, state: TrainState, report: StepReport) -> None:
        self.experts.update(state.step, self.objective.router.counts_LE)
        self.counts.add(report.totals)
        if report.is_logged:
            self._log(state, report)
        self.details.prepare(state.step + 1, state.samples)

    def _log(self, state: TrainState, report: StepReport) -> None:
        values: dict[str, Any] = {"step": state.step, "tokens": state.tokens}
        values |= read_step(report.terms, self.objective.router, report.outcome.grad_norm)
        values |= self.counts.read() | self.experts.read(state.step)
        values["train/skipped_steps"] = int(self.guard.skipped)
        values["train/lr"] = self.engine.learning_rate
        values |= mixture_shares(self.data, state.samples)
        details, flow_LEE = self.details.read()
        values |= details | self.throughput.measure(state.tokens)
        log.info(console_line(values, list(report.terms.named), state.last_step))
        for alert in self.alarms.check(values):
            if self.metrics.alert(alert.name, alert.text):
                log.warning("WARNING: %s", alert.text)
        has_details = self.details.is_due(state.step)
        self.metrics.write(values, has_details=has_details, flow_LEE=flow_LEE)
        self.guard.check(state.step)
        self.run.write_status("running", "training", state.step, state.last_step)

    def state_dict(self) -> dict[str, Any]:
        return {"expert_last_used": self.experts.last_used()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.experts = self._expert_use(state.get("expert_last_used"))

    def _expert_use(self, last_used: list[list[int]] | None) -> ExpertUse:
        config: OlmoeConfig = self._config
        return ExpertUse(
            config.num_hidden_layers, config.num_experts, self._dead_after, last_used, self._device
        )


class EndOfLog(Callback):
    """Closes the metrics after the other callbacks have ended."""

    def __init__(self, run: Run, metrics: MetricsLog) -> None:
        self.run, self.metrics = run, metrics

    def on_end(self, state: TrainState) -> None:
        if self.run.stopping and state.step < state.last_step:
            text = "a signal stopped the run; run the same command again to continue"
            self.metrics.alert(
                f"stopped at step {state.step}", f"step {state.step} of {state.last_step}: {text}"
            )
        self.metrics.close()


def console_line(values: dict[str, Any], terms: list[str], last_step: int) -> str:
    """One line per logged step, with the metrics that the registry shows, in its order.

    Args:
        values: The step's metrics by name.
        terms: Names of the objective's terms. A term that is no metric of the registry is shown, too.
        last_step: Last step of the run.
    """
    parts = [shown(metric.name, values.get(metric.name)) for metric in METRICS]
    names = {term: metric_name(term) for term in terms}
    others = [
        f"{term} {values[name]:.3f}"
        for term, name in names.items()
        if find_metric(name) is None and "/" not in term
    ]
    line = [f"step {values['step']}/{last_step}", *filter(None, parts)]
    return " | ".join([*line[:2], *others, *line[2:]])


def mixture_shares(data: TrainingData, samples: int) -> dict[str, float]:
    """data/* of the first `samples` samples about sources and stages; empty where the data has no sources."""
    if not has_sources(data.cfg):
        return {}
    of_all, values = data.samples, {}
    shares = source_shares(of_all, samples)
    if data.cfg.stages:
        number = of_all.schedule.stage_of(samples - 1)
        values["data/stage"] = float(number + 1)
        of_stage = stage_shares(of_all, of_all.stages[number], samples)
        shares = {name: share | of_stage[name] for name, share in shares.items()}
    values |= {f"data/{name}/{key}": value for name, share in shares.items() for key, value in share.items()}
    return values
