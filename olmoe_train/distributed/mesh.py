"""The process group, and how its ranks are arranged: which of them shard a parameter, which hold copies."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from olmoe_train.config.choices import Device, Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.utils.errors import UserError

# How long a collective waits for the slowest rank, a first step that compiles included.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Mesh:
    """Ranks as grids, in row-major order. Every rank sees other data."""

    device: torch.device
    dense: DeviceMesh
    """(replicate, shard): copies of the model, and the ranks that share one copy; without the experts, where
    those are parallel."""
    expert: DeviceMesh | None
    """(replicate, expert_shard, expert) for expert parameters; None without expert parallelism. A mesh of its
    own, not a slice of one common grid: with ddp there are fewer copies of the experts than of the rest."""


def resolve_device(device: str | Device = Device.auto) -> torch.device:
    """The device type to compute on.

    Args:
        device: "auto" (cuda if torch can use a GPU, else cpu), "cpu" or "cuda".

    Returns:
        torch.device("cuda") or torch.device("cpu"), without an index.

    Raises:
        UserError: "cuda" is asked for, and torch finds no GPU.
    """
    device = Device(device)
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise UserError(
            "trainer.device=cuda: torch finds no CUDA GPU on this machine; set trainer.device=auto"
        )
    return torch.device("cuda" if available and device is not Device.cpu else "cpu")


def init_distributed(device: str = "auto", timeout: timedelta = COLLECTIVE_TIMEOUT) -> torch.device:
    """Join the process group of torchrun's environment, or make one of a single rank; the rank's device.

    device: "auto" (cuda where there is one), "cpu" or "cuda". CPU tensors travel by gloo in every case, CUDA
    tensors by NCCL. A group that is there already is used.
    """
    cuda = resolve_device(device).type == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            _join(backend, timeout)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _join(backend: str, timeout: timedelta) -> None:
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # Workers that torchrun restarts get the store of those before, and would look for these (torch 2.13).
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"restart-{restart}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistNetworkError as error:
        address = ", ".join(f"{key}={os.environ.get(key)}" for key in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(
            f"the ranks cannot meet at {address}: {str(error).splitlines()[0]}\n  "
            "Choose a port that is not in use (torchrun --standalone takes a free one), or end what uses it."
        ) from None


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """The grids of a validated configuration, over all ranks of the process group.

    fsdp: replicate_size copies, each sharded over the rest; expert parallelism takes neighbouring ranks of
    one copy, so that rows travel inside a machine where it is large enough. ddp: a copy on every rank; a copy
    of the experts is then spread over expert_parallel_size ranks. deepspeed: one copy, in CPU memory, for its
    checkpoints; the engine arranges ranks by itself, in the same order.
    """
    if parallel.strategy is Strategy.deepspeed:
        device = torch.device("cpu")
    world, experts = dist.get_world_size(), parallel.expert_parallel_size
    replicate = world if parallel.strategy is Strategy.ddp else parallel.replicate_size
    dense_shape = (replicate, world // replicate)
    dense = init_device_mesh(device.type, dense_shape, mesh_dim_names=("replicate", "shard"))
    if experts == 1:
        return Mesh(device, dense, expert=None)
    expert_replicate = world // experts if parallel.strategy is Strategy.ddp else replicate
    expert_shape = (expert_replicate, world // (expert_replicate * experts), experts)
    names = ("replicate", "expert_shard", "expert")
    return Mesh(device, dense, init_device_mesh(device.type, expert_shape, mesh_dim_names=names))


def copies(tensor: Tensor) -> int:
    """How many ranks hold each element of a parameter or gradient: 1, or more with HSDP and ddp."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, sharing memory with it; a plain tensor as it is."""
    # Not hasattr(tensor, "to_local"): torch.compile takes that for false.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
