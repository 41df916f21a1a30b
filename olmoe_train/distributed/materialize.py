"""Memory and initial values for a parallelized meta model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Shard

from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.add import adapter_initial_value
from olmoe_train.model.adapters.spec import is_adapter_parameter
from olmoe_train.model.initialization import initial_value


@torch.no_grad()
def materialize(model: OlmoeForCausalLM, device: torch.device, seed: int) -> None:
    """Allocate a parallelized meta model and fill it with initial weights, in place. Of a model with an
    adapter, only the adapter is filled.

    The weights are the same in every layout, bit for bit. Of stacked expert weights, each rank generates only
    the experts of its shard. Every other parameter is generated whole, one parameter at a time, before the
    rank copies its shard.

    Args:
        model: The model on the meta device, after `parallelize`.
        device: Device of this rank.
        seed: Seed of the run.
    """
    model.to_empty(device=device)
    reset_buffers(model)
    for name, parameter in model.named_parameters():
        of_adapter = is_adapter_parameter(name)
        if model.adapter is not None and not of_adapter:
            continue  # the base is loaded from model.init_from
        index = shard_slices(parameter)
        experts = range(*index[0].indices(parameter.shape[0])) if parameter.ndim == 3 else None
        if of_adapter:
            value = adapter_initial_value(name, parameter.shape, seed, experts)
        else:
            std, distribution = model.config.initializer_range, model.config.initialization
            value = initial_value(name, parameter.shape, seed, std, experts, distribution)
        rest = (slice(None), *index[1:]) if experts is not None else index
        local_tensor(parameter).copy_(value[rest])


def reset_buffers(model: nn.Module) -> None:
    """Give every buffer its initial value, which is lost when memory is allocated for a meta model.

    A module that registers buffers must have a method `reset_buffers` that fills the buffers. The values must
    not depend on the rank. Buffers are not sharded: every rank holds each buffer whole.

    Args:
        model: A model with allocated memory.
    """
    for name, module in model.named_modules():
        if any(True for _ in module.buffers(recurse=False)):
            reset = getattr(module, "reset_buffers", None)
            assert reset is not None, (
                f"{name} has buffers and no reset_buffers(): they would be uninitialized"
            )
            reset()


def shard_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Position of this rank's shard in the whole tensor, one slice per dimension.

    Args:
        tensor: A DTensor, or a plain tensor, which is its own shard.
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None
    return slices_at(coordinates, tensor.device_mesh.shape, tensor.placements, tensor.shape)


def slices_at(
    coordinates: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    shape: Sequence[int],
) -> tuple[slice, ...]:
    """Position of one rank's shard in a whole DTensor, one slice per dimension.

    DTensor shards a dimension into chunks of ceil(size / ranks); the last chunks are shorter or empty.

    Args:
        coordinates: Those of the rank in the mesh.
        mesh_shape: Shape of the mesh.
        placements: Those of the tensor, one per dimension of the mesh.
        shape: Shape of the whole tensor.
    """
    bounds = [(0, size) for size in shape]
    for size, at, placement in zip(mesh_shape, coordinates, placements, strict=True):
        if isinstance(placement, Shard):
            start, stop = bounds[placement.dim]
            chunk = -(-(stop - start) // size)
            bounds[placement.dim] = (min(start + at * chunk, stop), min(start + (at + 1) * chunk, stop))
    return tuple(slice(start, stop) for start, stop in bounds)
