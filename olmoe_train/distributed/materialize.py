"""Gives a parallelized meta model memory and its initial weights."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.initialization import initial_value


@torch.no_grad()
def initialise(model: OlmoeForCausalLM, device: torch.device, seed: int) -> None:
    """Give a parallelized meta model memory, and the same initial weights in every layout, bit for bit.

    Each rank draws what its shards need: its own experts of the stacked expert weights, and the others whole,
    one at a time.
    """
    model.to_empty(device=device)
    reset_buffers(model)
    for name, parameter in model.named_parameters():
        index = shard_slices(parameter)
        experts = range(*index[0].indices(parameter.shape[0])) if parameter.ndim == 3 else None
        value = initial_value(name, parameter.shape, seed, model.config.initializer_range, experts)
        rest = (slice(None), *index[1:]) if experts is not None else index
        local_tensor(parameter).copy_(value[rest])


def reset_buffers(model: nn.Module) -> None:
    """Give every buffer its initial value, which is lost when a meta model gets memory.

    A module that registers buffers has a method `reset_buffers` that fills them. The values must not depend
    on the rank. Buffers are not sharded: every rank holds them whole.
    """
    for name, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            reset = getattr(module, "reset_buffers", None)
            assert reset is not None, (
                f"{name} has buffers and no reset_buffers(): they would be uninitialized"
            )
            reset()


def shard_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole tensor, a slice a dimension.

    DTensor's rule: chunks of ceil(size / ranks), the last ones shorter or empty.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        coordinates = tensor.device_mesh.get_coordinate()
        assert coordinates is not None
        for size, at, placement in zip(tensor.device_mesh.shape, coordinates, tensor.placements, strict=True):
            if isinstance(placement, Shard):
                start, stop = bounds[placement.dim]
                chunk = -(-(stop - start) // size)
                bounds[placement.dim] = (min(start + at * chunk, stop), min(start + (at + 1) * chunk, stop))
    return tuple(slice(start, stop) for start, stop in bounds)
