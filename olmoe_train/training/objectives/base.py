"""The objective seam: what a step minimizes.

Shapes: L layers, E experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from olmoe_train.config.train import EvaluationConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.training.batch import Batch, Totals

Heartbeat = Callable[[Iterable[Batch]], Iterable[Batch]]
"""Wraps the batches of a long pass over data, to report progress to the watchdog."""


@dataclass(frozen=True)
class Validation:
    """Result on one set of validation data."""

    values: dict[str, float | list[float | None]]
    """Value by name; metrics show each as eval/SET/NAME. `loss` is one of them, and comes first."""
    count: str
    """How much data that is, for people: "1,234 tokens"."""


@dataclass
class RouterSums:
    """Sums over this rank's micro-batches of a step, on the device; padding is not counted."""

    counts_LE: Tensor
    """Tokens that each layer sent to each expert, fp32."""
    entropy_L: Tensor
    """Entropy of the routing distribution in nats, summed over tokens and divided by the tokens of the global
    batch, fp32."""
    z_L: Tensor
    """logsumexp(logits)^2, summed and divided like the entropy, fp32."""

    @classmethod
    def zeros(cls, layers: int, experts: int, device: torch.device) -> "RouterSums":
        counts_LE = torch.zeros(layers, experts, device=device)
        return cls(counts_LE, torch.zeros(layers, device=device), torch.zeros(layers, device=device))


class Objective(Protocol):
    """Next-token prediction (next_token.py) is one. A new objective is one file and one preset.

    Each loss is a share: summed over the micro-batches of all ranks, the shares are the step's loss over its
    global batch. So neither loss nor gradients depend on how the batch is cut.
    """

    columns: tuple[str, ...]
    """Columns that each micro-batch must have."""

    @property
    def router(self) -> RouterSums:
        """Of the current step; complete after its last micro-batch."""

    def begin_step(
        self, model: OlmoeForCausalLM, micro_batches: list[Batch], totals: Totals, logged: bool
    ) -> Totals:
        """Before the first micro-batch: passes over the whole step, if the loss needs them; collective.

        Args:
            model: called without gradients.
            micro_batches: this rank's, on the device. They may get further columns, or others.
            totals: counts over the global batch.
            logged: whether the step's values are logged.

        Returns:
            The counts over the global batch as it is now.
        """

    def __call__(
        self, model: OlmoeForCausalLM, micro_batch: Batch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(The share of the loss, which has a gradient; shares of named terms, unweighted.)

        All are fp32 scalars. Metrics and wandb show each term under `metrics.metric_name`.
        """

    def end_step(self, model: OlmoeForCausalLM, totals: Totals, skipped: Tensor) -> None:
        """After the update, on every rank; collective where it has to be.

        Args:
            model: as updated.
            totals: counts over the global batch.
            skipped: bool scalar on the device, whether the update was not applied.
        """

    def validate(
        self, model: OlmoeForCausalLM, data: TrainingData, cfg: EvaluationConfig, with_heartbeat: Heartbeat
    ) -> dict[str, Validation]:
        """Result on the validation split of each source by its name, and on all together. Collective.

        Args:
            model: As trained so far.
            data: The data of the run. At least one source has a validation split.
            cfg: Batch size, and number of samples per source.
            with_heartbeat: Wraps the batches.
        """
