"""Compare models on the same questions and the same texts, and tell differences from noise.

Shapes: N questions of a task, or sequences of a set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olmoe_train.evaluation.perplexity import Evaluation
from olmoe_train.evaluation.tasks.score import TaskResult, standard_error
from olmoe_train.evaluation.tasks.task import TaskMetric
from olmoe_train.utils.finite import finite_or_none
from olmoe_train.utils.tables import aligned

NOISE_SIGMAS = 1.96
"""A difference within this many standard errors of 0 is noise: 95% of normal noise is within them."""
LEFT = (0, 1)
"""Columns of names, in tables of results."""
METHOD = (
    f"± is one standard error of the mean over questions (binomial, for accuracies), or over sequences. A "
    f"difference is paired by question or sequence; within {NOISE_SIGMAS} standard errors of 0 it is noise."
)


@dataclass(frozen=True)
class Estimate:
    value: float
    error: float
    """Standard error; NaN: unknown, as for a single question."""

    @property
    def is_noise(self) -> bool:
        """Whether the value cannot be told from 0; false if the error is unknown."""
        return abs(self.value) <= NOISE_SIGMAS * self.error

    def text(self, sign: str = "") -> str:
        """Value ± standard error, for people. sign: "+" to show it of positive values, too."""
        error = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        return f"{self.value:{sign}.4f}{error}"

    def as_json(self) -> dict[str, Any]:
        return {"value": finite_or_none(self.value), "stderr": finite_or_none(self.error)}


@dataclass(frozen=True)
class Comparison:
    """One metric of one task or set, of every model."""

    name: str
    """Of the task or set."""
    metric: str
    scores: list[Estimate]
    """One per model."""
    differences: list[Estimate]
    """Of every model but the first one, from the first one."""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "scores": [one.as_json() for one in self.scores],
            "differences": [one.as_json() | {"noise": one.is_noise} for one in self.differences],
        }


def compare_tasks(models: Sequence[list[TaskResult]]) -> list[Comparison]:
    """Compare models by the metric of each task. All models answered the same questions."""
    comparisons = []
    for results in zip(*models, strict=True):
        metric = results[0].metric
        scores = [Estimate(one.mean(metric), one.standard_error(metric)) for one in results]
        first, *others = (one.values[metric] for one in results)
        differences = [
            Estimate(float((values - first).mean()), standard_error(values - first)) for values in others
        ]
        comparisons.append(Comparison(results[0].name, metric.value, scores, differences))
    return comparisons


def compare_sets(models: Sequence[dict[str, Evaluation]]) -> list[Comparison]:
    """Compare models by the loss of each set, in nats per token. All models read the same sequences."""
    comparisons = []
    for name in models[0]:
        sums = [one[name].sequence_sums for one in models]
        first, *others = (sums_N2 for sums_N2 in sums if sums_N2 is not None)
        differences = []
        for sums_N2 in others:
            assert np.array_equal(sums_N2[:, 1], first[:, 1]), "models read different sequences"
            losses_N = sums_N2[:, 0] - first[:, 0]
            differences.append(_mean_per_token(losses_N, first[:, 1]))
        scores = [_mean_per_token(sums_N2[:, 0], sums_N2[:, 1]) for sums_N2 in (first, *others)]
        comparisons.append(Comparison(name, "loss", scores, differences))
    return comparisons


def _mean_per_token(losses_N: NDArray[np.float64], tokens_N: NDArray[np.float64]) -> Estimate:
    """The sum of losses divided by the sum of tokens, with the standard error of a ratio over sequences."""
    number, tokens = len(losses_N), float(tokens_N.sum())
    if number == 0:
        return Estimate(math.nan, math.nan)
    mean = float(losses_N.sum()) / tokens
    if number == 1:
        return Estimate(mean, math.nan)
    residuals_N = losses_N - mean * tokens_N
    variance = number / (number - 1) * float((residuals_N**2).sum())
    return Estimate(mean, math.sqrt(variance) / tokens)


def comparison_table(comparisons: Sequence[Comparison], models: int) -> str:
    """Lines of a table: a column per model, [1], [2] and so on, and one per difference from [1]."""
    head = ["", "metric", *(f"[{number + 1}]" for number in range(models))]
    head += [f"[{number + 1}] - [1]" for number in range(1, models)]
    rows = [
        [
            one.name,
            one.metric,
            *(score.text() for score in one.scores),
            *(f"{gap.text('+')}  {'noise' if gap.is_noise else '     '}" for gap in one.differences),
        ]
        for one in comparisons
    ]
    return "\n".join(aligned([head, *rows], LEFT))


def task_table(results: Sequence[TaskResult]) -> str:
    """Lines of a table: one per task."""
    rows = [["task", "metric", "score", "guessing", "bits per byte", "questions"]]
    for one in results:
        bits = one.mean(TaskMetric.bits_per_byte)
        score = Estimate(one.mean(one.metric), one.standard_error(one.metric))
        guessing = "-" if one.chance is None else f"{one.chance:.4f}"
        rows.append([one.name, one.metric.value, score.text(), guessing, f"{bits:.4f}", f"{one.questions:,}"])
    return "\n".join(aligned(rows, LEFT))
