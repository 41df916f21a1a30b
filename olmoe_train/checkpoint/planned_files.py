"""The files of a checkpoint before there is one: what each rank would write, from the tensors of one rank.

`write_checkpoint` (sharded.py) leaves it to torch.distributed.checkpoint (DCP) which rank writes a shard that
several ranks hold. DCP's own planner decides here as well. It only needs the shapes of all ranks' shards, and
those follow from the meshes.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from olmoe_train.checkpoint.sharded import file_numbers
from olmoe_train.distributed.materialize import shard_slices

Files = dict[str, int]
"""Bytes of the tensors of each file, by the name of the file. The header of a file is not counted."""


def planned_files(tensors: Mapping[str, Tensor], world_size: int) -> list[Files]:
    """Return the files that each rank would write.

    Args:
        tensors: The tensors of a checkpoint on any rank, by their name on disk; only shapes are read.
        world_size: Number of ranks; the meshes of the tensors have as many.

    Raises:
        ValueError: The shards of the ranks overlap, or leave out a part of a tensor.
    """
    places = {name: rank_coordinates(tensor, world_size) for name, tensor in tensors.items()}
    plans = [
        SavePlan([_write_item(name, tensor, places[name][rank]) for name, tensor in tensors.items()])
        for rank in range(world_size)
    ]
    plans, _ = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    numbers = file_numbers(tensors)
    last = max(numbers.values())
    written: list[Files] = []
    for rank, plan in enumerate(plans, start=1):  # DCP numbers the shards of rank 0 as 1
        files: Files = {}
        for item in plan.items:
            name = f"shard-{rank:05d}-model-{numbers[item.index.fqn]:05d}-of-{last:05d}.safetensors"
            assert item.tensor_data is not None
            element = torch.empty(0, dtype=item.tensor_data.properties.dtype).element_size()
            files[name] = files.get(name, 0) + math.prod(item.tensor_data.chunk.sizes) * element
        written.append(files)
    return written


def rank_coordinates(tensor: Tensor, world_size: int) -> list[Sequence[int]]:
    """Return each rank's coordinates in the mesh of a DTensor; of a plain tensor they are empty."""
    if not isinstance(tensor, DTensor):
        return [()] * world_size
    shape = tensor.device_mesh.shape
    ranks = tensor.device_mesh.mesh.flatten().tolist()
    assert sorted(ranks) == list(range(world_size)), "every mesh has all ranks"
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    places: list[Sequence[int]] = [()] * world_size
    for position, rank in enumerate(ranks):
        places[rank] = [position // stride % size for stride, size in zip(strides, shape, strict=True)]
    return places


def _write_item(name: str, tensor: Tensor, coordinates: Sequence[int]) -> WriteItem:
    """What DCP plans for a rank's shard of a tensor."""
    slices = shard_slices(tensor, coordinates)
    offsets = torch.Size([part.start for part in slices])
    sizes = torch.Size([part.stop - part.start for part in slices])
    kind = WriteItemType.SHARD if isinstance(tensor, DTensor) else WriteItemType.TENSOR
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape)
    )
    return WriteItem(MetadataIndex(name, offsets), kind, tensor_data=data)
