"""The process group, and how its ranks are arranged: which of them shard a parameter, which hold copies."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from olmoe_train.config import ParallelConfig, Strategy

# How long a collective waits for the slowest rank, a first step that compiles included.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Mesh:
    """Ranks as a grid, in row-major order. Every rank sees other data."""

    device: torch.device
    dense: DeviceMesh
    """(replicate, shard): copies of the model, and the ranks that share one copy."""

    @property
    def replicate_size(self) -> int:
        """Copies of each parameter."""
        return self.dense.size(0)


def init_distributed(device: str = "auto", timeout: timedelta = COLLECTIVE_TIMEOUT) -> torch.device:
    """Join the process group of torchrun's environment, or make one of a single rank; the rank's device.

    device: "auto" (cuda where there is one), "cpu" or "cuda". CPU tensors travel by gloo in every case, CUDA
    tensors by NCCL. A group that is there already is used.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """The grid of a validated configuration, over all ranks of the process group.

    fsdp: replicate_size copies, each sharded over the rest. ddp: a copy on every rank.
    """
    world = dist.get_world_size()
    replicate = world if parallel.strategy is Strategy.ddp else parallel.replicate_size
    shape = (replicate, world // replicate)
    return Mesh(device, init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")))


def copies(tensor: Tensor) -> int:
    """How many ranks hold each element of a sharded parameter or gradient: 1, or more with HSDP and ddp."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())
