"""Validation before the first step, every evaluation.every steps, and after the run's last step."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.manifest import TOKENIZER
from olmoe_train.data.mixture import has_sources, mixture_components
from olmoe_train.data.shares import source_shares
from olmoe_train.data.token_bytes import token_bytes_or_reason
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.evaluation.comparison import task_table
from olmoe_train.evaluation.perplexity import evaluate_sets
from olmoe_train.evaluation.samples import sample_prompts
from olmoe_train.evaluation.tasks.requests import EncodedTask
from olmoe_train.evaluation.tasks.score import TaskResult, evaluate_tasks, task_numbers
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.run.loggers import MetricsLog
from olmoe_train.run.metrics_registry import shown
from olmoe_train.run.watchdog import Watchdog
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.objectives.base import Objective, Validation
from olmoe_train.training.objectives.next_token import validation_of
from olmoe_train.training.state import TrainState
from olmoe_train.training.throughput import Throughput
from olmoe_train.utils.errors import UserError

log = logging.getLogger(__name__)


class Evaluate(Callback):
    """What the objective measures on the validation splits, eval/NAME/loss and more, the cross-entropy of
    evaluation.sets, downstream tasks, and eval/samples."""

    def __init__(
        self,
        cfg: EvaluationConfig,
        data: TrainingData,
        tasks: list[EncodedTask],
        model: OlmoeForCausalLM,
        objective: Objective,
        metrics: MetricsLog,
        throughput: Throughput,
        watchdog: Watchdog,
        device: torch.device,
        averaged: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """averaged: Gives the model the average of its weights, for a time; None: there is none."""
        self.cfg, self.data, self.model, self.objective = cfg, data, model, objective
        self.tasks = tasks
        self.metrics, self.throughput, self.watchdog = metrics, throughput, watchdog
        self.device, self.has_warned, self.averaged = device, False, averaged
        self.has_data = any(manifest.validation.tokens for manifest in data.manifests.values())

    def on_start(self, state: TrainState) -> None:
        if not self.has_data:
            log.warning("WARNING: the data has no validation split, so it is not evaluated")
        if state.step == 0 and self.cfg.at_start:
            self._evaluate(state)

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if state.step == state.last_step or (self.cfg.every and state.step % self.cfg.every == 0):
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        if not (self.has_data or self.cfg.sets or self.tasks or self.cfg.prompts):
            return
        results = self._losses()
        self._warn_without_bytes(results)
        if self.averaged is not None:
            with self.averaged():
                of_average = self._losses()
            for name, one in of_average.items():
                results[name].values["ema_loss"] = one.values["loss"]
        answers = evaluate_tasks(
            self.model, self.tasks, self.cfg.tokens_per_pass, self.device, self.watchdog.with_heartbeat
        )
        samples = self._sample() if self.cfg.prompts else {}
        self._log(state, results, answers, samples)
        self.throughput.restart(state.tokens)

    def _losses(self) -> dict[str, Validation]:
        """Results on the validation splits and on evaluation.sets, with the weights of the moment."""
        results: dict[str, Validation] = {}
        if self.has_data:
            results = self.objective.validate(self.model, self.data, self.cfg, self.watchdog.with_heartbeat)
        of_sets = evaluate_sets(
            self.model, self.data.cfg, self.cfg, self.device, self.watchdog.with_heartbeat
        )
        return results | {name: validation_of(one) for name, one in of_sets.items()}

    def _warn_without_bytes(self, results: dict[str, Validation]) -> None:
        """Say once why losses of text have no bits per byte."""
        text = [one.values for one in results.values() if "perplexity" in one.values]
        if self.has_warned or all("bits_per_byte" in values for values in text):
            return
        _, reason = token_bytes_or_reason(self.data.cfg)
        if reason is not None:
            log.warning("WARNING: eval/NAME/bits_per_byte is not measured: %s", reason)
        self.has_warned = True

    def _sample(self) -> dict[str, Any]:
        """eval/samples; nothing where a logit is not finite, which the losses show, too."""
        tokenizer = load_tokenizer(mixture_components(self.data.cfg)[0].directory / TOKENIZER)
        with_heartbeat = partial(self.watchdog.with_heartbeat, where="sampling")
        arguments = (self.cfg.prompts, self.cfg.sample_tokens, self.device, with_heartbeat)
        try:
            return {"eval/samples": sample_prompts(self.model, tokenizer, *arguments)}
        except UserError as error:
            log.warning("WARNING: evaluation.prompts were not continued: %s", error)
            return {}

    def _log(
        self,
        state: TrainState,
        results: dict[str, Validation],
        answers: list[TaskResult],
        samples: dict[str, Any],
    ) -> None:
        values: dict[str, Any] = {"step": state.step, "tokens": state.tokens} | samples
        for name, result in results.items():
            of_set = {f"eval/{name}/{key}": value for key, value in result.values.items()}
            numbers = {key: value for key, value in of_set.items() if not isinstance(value, list)}
            parts = [text for key, value in numbers.items() if (text := shown(key, value)) is not None]
            log.info(" | ".join([f"step {state.step}", f"{name} {parts[0]}", *parts[1:], result.count]))
            values |= of_set
        if answers:
            values |= task_numbers(answers) | {"eval/tasks": [one.row for one in answers]}
            for line in task_table(answers).splitlines():
                log.info("step %d | %s", state.step, line)
        for sample in samples.get("eval/samples", []):
            log.info("step %d | %r continues as %r", state.step, sample["prompt"], sample["completion"])
        self.metrics.write(values)
        shares = source_shares(self.data.samples, state.samples) if has_sources(self.data.cfg) else {}
        for name, share in shares.items():
            log.info(
                f"step {state.step} | {name}: {share['share']:.2%} of the tokens so far, "
                f"{share['requested_share']:.2%} requested | {share['epochs']:.3f} epochs"
            )
