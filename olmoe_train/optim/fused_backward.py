"""trainer.fused_backward: each parameter is updated in the backward pass, as soon as its gradient is there.

The gradient is then freed, so gradients of the whole model never exist at once: 4 bytes per trained parameter
less (as in LOMO, arXiv 2306.09782, with AdamW's moments). What needs all gradients before the first update
is not possible: clipping, skipped spikes, and several micro-batches per step.
"""

import torch
from torch import Tensor, nn

from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.optim.average import parameters_of
from olmoe_train.optim.skip_step import step_unless


class FusedBackward:
    """The backward pass of a step on one rank, with the optimizer's updates in it.

    A parameter whose gradient is not finite keeps its value and its moments. The others of that step may have
    been updated before.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """
        Args:
            optimizer: One that updates each parameter by itself, such as AdamW. Its `step` passes over
                parameters without a gradient.
            device: That of the gradients.
        """
        self.optimizer = optimizer
        self._is_on = False
        self._square = torch.zeros((), device=device)
        for parameter in parameters_of(optimizer):
            parameter.register_post_accumulate_grad_hook(self._update)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a step's loss, and update each parameter when its gradient is there."""
        self._square.zero_()
        self._is_on = True  # other backward passes, such as those that explain a spike, update nothing
        try:
            loss.backward()
        finally:
            self._is_on = False

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients of the last `backward`, fp32 scalar on the device."""
        return self._square.sqrt()

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        if not self._is_on:
            return
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(local_tensor(parameter.grad), dtype=torch.float32)
        self._square += norm.square()
        step_unless(self.optimizer, ~norm.isfinite())
        parameter.grad = None
