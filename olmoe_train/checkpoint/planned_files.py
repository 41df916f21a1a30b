"""The files of a checkpoint before there is one: what each rank would write, from the tensors of one rank.

`write_checkpoint` (sharded.py) leaves it to torch.distributed.checkpoint (DCP) which rank writes a shard that
several ranks hold. DCP's own planner decides here as well. It only needs the shapes of all ranks' shards, and
those follow from the meshes.
"""

import itertools
import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from olmoe_train.checkpoint.sharded import file_numbers
from olmoe_train.distributed.materialize import slices_at

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
    shards = {name: shards_of_ranks(tensor, world_size) for name, tensor in tensors.items()}
    plans = [
        SavePlan([_write_item(name, tensor, shards[name][rank]) for name, tensor in tensors.items()])
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
            data = item.tensor_data
            assert data is not None
            size = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
            files[name] = files.get(name, 0) + size
        written.append(files)
    return written


def shards_of_ranks(tensor: Tensor, world_size: int) -> list[ChunkStorageMetadata]:
    """Return offsets and sizes of each rank's shard of a tensor; a plain tensor is every rank's own."""
    if isinstance(tensor, DTensor):
        return _shards(tensor.device_mesh, tensor.placements, tensor.shape)
    return [ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.shape)] * world_size


@lru_cache(maxsize=256)  # a parameter and its moments have the same, and so have the layers
def _shards(
    mesh: DeviceMesh, placements: tuple[Placement, ...], shape: torch.Size
) -> list[ChunkStorageMetadata]:
    sizes = mesh.shape
    ranks = mesh.mesh.flatten().tolist()
    shards: dict[int, ChunkStorageMetadata] = {}
    for rank, coordinates in zip(ranks, itertools.product(*map(range, sizes)), strict=True):
        slices = slices_at(coordinates, sizes, placements, shape)
        offsets = torch.Size([part.start for part in slices])
        shards[rank] = ChunkStorageMetadata(offsets, torch.Size([part.stop - part.start for part in slices]))
    return [shards[rank] for rank in range(len(ranks))]


def _write_item(name: str, tensor: Tensor, shard: ChunkStorageMetadata) -> WriteItem:
    """What DCP plans for a rank's shard of a tensor."""
    kind = WriteItemType.SHARD if isinstance(tensor, DTensor) else WriteItemType.TENSOR
    data = TensorWriteData(shard, TensorProperties(dtype=tensor.dtype), tensor.shape)
    return WriteItem(MetadataIndex(name, shard.offsets), kind, tensor_data=data)
