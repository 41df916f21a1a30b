"""The FSDP2 engine: parallel.strategy=fsdp and ddp."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from olmoe_train.checkpoint.sharded import load_checkpoint
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.optim.build import scale_learning_rates
from olmoe_train.optim.clipping import clip_gradients
from olmoe_train.optim.fused_backward import FusedBackward
from olmoe_train.optim.skip_step import step_unless
from olmoe_train.training.engine.base import Judge, StepOutcome


class FsdpEngine:
    """A parallelized model (distributed/parallelize.py) and its optimizer. See base.Engine."""

    def __init__(
        self,
        model: OlmoeForCausalLM,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        device: torch.device,
        fused_backward: bool = False,
    ) -> None:
        """fused_backward: update in the backward pass (optim/fused_backward.py)."""
        self.fused = FusedBackward(optimizer, device) if fused_backward else None
        self.model, self.optimizer, self.device = model, optimizer, device
        self.max_grad_norm = max_grad_norm

    @property
    def learning_rate(self) -> float:
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def set_learning_rate(self, multiplier: float) -> None:
        scale_learning_rates(self.optimizer, multiplier)

    def backward(self, loss: Tensor, last: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        # Over shards with every micro-batch, so that gradients stay sharded; over replicas once per step.
        self.model.set_requires_all_reduce(last)
        if self.fused is not None:
            self.fused.backward(loss)
        else:
            loss.backward()

    def step(self, judge: Judge) -> StepOutcome:
        if self.fused is not None:
            grad_norm = self.fused.grad_norm()
            return StepOutcome(grad_norm, judge(grad_norm))
        grad_norm = clip_gradients(self.model.parameters(), self.max_grad_norm)
        skipped = judge(grad_norm)
        step_unless(self.optimizer, skipped)
        self.optimizer.zero_grad()
        return StepOutcome(grad_norm, skipped)

    def state(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.model, self.optimizer

    def load(self, checkpoint: Path) -> dict[str, Any]:
        return load_checkpoint(checkpoint, self.model, self.optimizer)
