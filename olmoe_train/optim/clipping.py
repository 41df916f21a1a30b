"""Exact gradient clipping over parameters that are sharded over different meshes."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmoe_train.distributed.mesh import copies, local_tensor


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, copies: Callable[[nn.Parameter], int] = copies
) -> Tensor:
    """Scale all gradients in place so that their global 2-norm is at most `max_norm`. Collective.

    Experts and the other parameters are sharded over different meshes. Each value of a parameter's gradient
    exists on `copies` ranks, so one all-reduce of the local sums, each divided by `copies`, gives the exact
    norm.

    Args:
        parameters: The parameters. Those without a gradient are ignored.
        max_norm: Maximum global 2-norm. 0 leaves the gradients unchanged.
        copies: Returns on how many ranks each value of a parameter exists.

    Returns:
        The global 2-norm before clipping, an fp32 scalar on the gradients' device.
    """
    trained = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    shards = [local_tensor(gradient) for _, gradient in trained]
    shares = torch.tensor([1 / copies(parameter) for parameter, _ in trained], device=shards[0].device)
    square = torch.stack(torch._foreach_norm(shards, 2, torch.float32)).square() @ shares
    dist.all_reduce(square)
    norm = square.sqrt()
    if max_norm > 0:
        torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
