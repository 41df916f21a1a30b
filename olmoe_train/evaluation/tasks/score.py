"""Ask a model the questions of tasks, and sum up its answers.

Shapes: Q questions of a task, N requests.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from olmoe_train.evaluation.tasks.log_likelihoods import Packs, log_likelihoods
from olmoe_train.evaluation.tasks.requests import EncodedTask
from olmoe_train.evaluation.tasks.task import ACCURACIES, TaskFormat, TaskMetric
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.utils.finite import finite_or_none

Values = NDArray[np.float64]


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to the questions of one task."""

    name: str
    metric: TaskMetric
    """The metric that the task is known by."""
    chance: float | None
    """Expected accuracy of guessing; None: the metric is no accuracy."""
    values: dict[TaskMetric, Values]
    """Metric -> its value for each question, fp64 [Q]. NaN: one of its log-likelihoods is not finite."""
    cut_contexts: int
    """Requests whose context lost its beginning, because they were longer than the model can read."""

    @property
    def questions(self) -> int:
        return len(self.values[self.metric])

    def mean(self, metric: TaskMetric) -> float:
        return float(self.values[metric].mean())

    def standard_error(self, metric: TaskMetric) -> float:
        """Standard error of the mean over questions; for an accuracy it is the binomial one."""
        return standard_error(self.values[metric])

    @property
    def row(self) -> dict[str, Any]:
        """The task's row in tables: JSON values, null where a number is not finite."""
        return {
            "task": self.name,
            "metric": self.metric.value,
            "score": finite_or_none(self.mean(self.metric)),
            "stderr": finite_or_none(self.standard_error(self.metric)),
            "chance": self.chance,
            "questions": self.questions,
        }


def standard_error(values_Q: Values) -> float:
    """Standard deviation of the sample over the root of its size; NaN for one value."""
    return float(values_Q.std(ddof=1)) / math.sqrt(len(values_Q)) if len(values_Q) > 1 else math.nan


def evaluate_tasks(
    model: OlmoeForCausalLM,
    tasks: Sequence[EncodedTask],
    tokens_per_pass: int,
    device: torch.device,
    with_heartbeat: Callable[[Packs], Packs] = iter,
) -> list[TaskResult]:
    """Answer all questions of all tasks. Collective, if there are ranks; the arguments are those of
    `log_likelihoods`.

    Returns:
        The result of each task, the same on every rank and, up to rounding, for every number of ranks and of
        tokens per pass.
    """
    requests = [request for one in tasks for request in one.requests]
    if not requests:
        return []
    of_requests_N = log_likelihoods(model, requests, tokens_per_pass, device, with_heartbeat).numpy()
    results, start = [], 0
    for one in tasks:
        end = start + len(one.requests)
        results.append(_result(one, of_requests_N[start:end]))
        start = end
    return results


def _result(encoded: EncodedTask, log_likelihoods_N: Values) -> TaskResult:
    task, start = encoded.task, 0
    metrics = [one for one in TaskMetric if task.format is not TaskFormat.bpb or one not in ACCURACIES]
    values: dict[TaskMetric, list[float]] = {metric: [] for metric in metrics}
    for question in task.questions:
        choices = slice(start, start + len(question.choices))
        lengths = [question.length_of(choice) for choice in range(len(question.choices))]
        answers = question_values(
            log_likelihoods_N[choices],
            np.array([request.targets for request in encoded.requests[choices]]),
            np.array([characters for characters, _ in lengths]),
            np.array([bytes_ for _, bytes_ in lengths]),
            question.gold,
        )
        for metric in metrics:
            values[metric].append(answers[metric])
        start = choices.stop
    arrays = {metric: np.array(of_questions) for metric, of_questions in values.items()}
    return TaskResult(task.name, task.metric, task.chance, arrays, encoded.cut_contexts)


def question_values(
    log_likelihoods: Values,
    tokens: NDArray[np.int64],
    characters: NDArray[np.int64],
    bytes_: NDArray[np.int64],
    gold: int,
) -> dict[TaskMetric, float]:
    """The value of every metric for one question.

    Args:
        log_likelihoods: Of each choice, in nats.
        tokens, characters, bytes_: Length of each choice.
        gold: Index of the right choice.
    """
    if not np.isfinite(log_likelihoods).all():
        return dict.fromkeys(TaskMetric, math.nan)
    units = {
        TaskMetric.acc: np.ones_like(tokens),
        TaskMetric.acc_per_token: tokens,
        TaskMetric.acc_per_char: characters,
        TaskMetric.acc_per_byte: bytes_,
    }
    right = {metric: float((log_likelihoods / unit).argmax() == gold) for metric, unit in units.items()}
    nats = float(-log_likelihoods[gold])
    return right | {
        TaskMetric.ce: nats / float(tokens[gold]),
        TaskMetric.bits_per_byte: nats / (math.log(2) * float(bytes_[gold])),
    }


def task_numbers(results: Iterable[TaskResult]) -> dict[str, float]:
    """The metrics of a record of metrics.jsonl: task/NAME/METRIC."""
    return {f"task/{one.name}/{metric.value}": one.mean(metric) for one in results for metric in one.values}
