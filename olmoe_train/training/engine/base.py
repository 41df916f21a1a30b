"""The engine seam: who owns parameters, gradients and optimizer, and in what order a step updates them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from olmoe_train.model import OlmoeForCausalLM

Judge = Callable[[Tensor], Tensor]
"""Gradient norm of the step, fp32 scalar -> whether to skip the step's update, bool scalar on the device."""


@dataclass(frozen=True)
class StepOutcome:
    """What became of one optimizer step; scalars on the device."""

    grad_norm: Tensor
    """Global 2-norm of the gradients before clipping, fp32."""
    skipped: Tensor
    """bool: the update was not applied."""


class Engine(Protocol):
    """FSDP2 (fsdp.py) and DeepSpeed (deepspeed.py). The loop and the objectives know no more than this.

    Gradients are summed over ranks and micro-batches, never averaged: every loss is a share of the global
    batch's. The order of clipping, judging and updating is the engine's own.
    """

    model: OlmoeForCausalLM
    """What objectives call, by `training_forward`."""
    device: torch.device
    """Where this rank computes."""

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, as the last step used it."""

    def set_learning_rate(self, multiplier: float) -> None:
        """Give every parameter group its peak learning rate (`initial_lr`) times `multiplier`."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of a micro-batch's share of the step's loss; last: of the step."""

    def step(self, judge: Judge) -> StepOutcome:
        """Reduce, clip, ask `judge`, update unless the judge says to skip, and clear the gradients."""

    def state(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer with sharded tensors, as checkpoints hold them; collective."""

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Fill parameters, buffers and optimizer from a checkpoint of any layout; collective.

        Returns the checkpoint's JSON state. Raises CheckpointError if the checkpoint is damaged, UserError if
        it does not fit.
        """
