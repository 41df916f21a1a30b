"""The exponential moving average (EMA) of the trained weights, beside the weights: trainer.ema_decay.

After every update that is not skipped, e <- d e + (1 - d) w in fp32, elementwise, with e = w before the first
update. There is no bias to correct, because e starts at the weights and not at 0.

The average is a part of the optimizer's state, `state[parameter]["ema"]`, sharded like the parameter.
Therefore a checkpoint saves it, verifies it and fills it in any layout, as it does with moments.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from olmoe_train.distributed.fsdp import reshard
from olmoe_train.distributed.mesh import local_tensor

AVERAGE = "ema"
"""Name of the average in the optimizer's state of a parameter, and in checkpoints."""


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Make every step of an optimizer update the average of its parameters.

    The average begins with the weights before the next step, unless a checkpoint fills it before. The host
    does not wait for the device.

    Args:
        optimizer: Its parameters are fp32.
        decay: d, above 0 and below 1.
    """
    averages: dict[Tensor, Tensor] = {}  # only while a step is made

    def take_out(*_: Any) -> None:
        # Optimizers allocate their own state where it is empty, so the average is not in it meanwhile.
        for parameter in parameters_of(optimizer):
            average = optimizer.state[parameter].pop(AVERAGE, None)
            averages[parameter] = parameter.detach().clone() if average is None else average

    @torch.no_grad()
    def update(*_: Any) -> None:
        # Fused optimizers get found_inf (skip_step.py). The step of others is not called if it is skipped.
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        for parameter in parameters_of(optimizer):
            average = averages.pop(parameter)
            local = local_tensor(average)
            weight: Any = 1 - decay if found is None else torch.where(found.bool(), 0.0, 1 - decay)
            local.lerp_(local_tensor(parameter.detach()), weight)
            optimizer.state[parameter][AVERAGE] = average

    for group in optimizer.param_groups:
        group["average"] = True
    optimizer.register_step_pre_hook(take_out)
    optimizer.register_step_post_hook(update)


@contextmanager
def averages_as_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Exchange the weights with their averages, and exchange them back afterwards, bit for bit.

    One shard of one parameter is copied at a time. A parameter that has no average yet keeps its weight,
    with which the average will begin.

    Args:
        model: The model, with sharded parameters.
        optimizer: The optimizer of these parameters.
    """
    _exchange(model, optimizer)
    try:
        yield
    finally:
        _exchange(model, optimizer)


@torch.no_grad()
def _exchange(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    reshard(model)  # gathered weights are copies, which a forward pass would go on using
    for parameter in parameters_of(optimizer):
        average = optimizer.state.get(parameter, {}).get(AVERAGE)
        if average is not None:
            weight, average = local_tensor(parameter.detach()), local_tensor(average)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters of all groups of an optimizer."""
    for group in optimizer.param_groups:
        yield from group["params"]
