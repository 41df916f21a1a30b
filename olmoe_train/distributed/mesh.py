"""The process group and the meshes of its ranks: which ranks shard a parameter, and which hold copies."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from olmoe_train.config.choices import Device, Strategy
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.distributed.rendezvous import join
from olmoe_train.utils.errors import UserError

# Time that a collective waits for the slowest rank; long enough for a first step that compiles.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Mesh:
    """Ranks as grids, in row-major order. Every rank reads different data."""

    device: torch.device
    dense: DeviceMesh
    """(replicate, shard): copies of the model, and the ranks that share one copy. With expert parallelism
    this mesh does not apply to the experts."""
    expert: DeviceMesh | None
    """(replicate, expert_shard, expert) for expert parameters; None without expert parallelism. The mesh is
    separate and not a slice of one common grid, because with ddp there are fewer copies of the experts than
    of the other parameters."""


def resolve_device(device: str | Device = Device.auto, key: str = "trainer.device") -> torch.device:
    """The device type to compute on.

    Args:
        device: "auto" (cuda if torch can use a GPU, else cpu), "cpu" or "cuda".
        key: The option that names it, for messages.

    Returns:
        torch.device("cuda") or torch.device("cpu"), without an index.

    Raises:
        UserError: "cuda" is asked for, and torch finds no GPU.
    """
    device = Device(device)
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise UserError(f"{key}=cuda: torch finds no CUDA GPU on this machine; set {key}=auto")
    return torch.device("cuda" if available and device is not Device.cpu else "cpu")


def init_distributed(
    device: str = "auto",
    timeout_s: float = TrainerConfig.rendezvous_timeout,
    device_key: str = "trainer.device",
) -> torch.device:
    """Join the process group of torchrun's environment, or create a group of one rank without torchrun.

    CPU tensors always use gloo, and CUDA tensors use NCCL. If a process group exists, the function keeps it.

    Args:
        device: "auto" (cuda if torch can use a GPU, else cpu), "cpu" or "cuda".
        timeout_s: Maximum time until all ranks have met, in seconds. After it, the process reports which
            ranks are missing and exits with 1.
        device_key: The option that names the device, for messages.

    Returns:
        The device of this rank; for cuda with the index LOCAL_RANK.

    Raises:
        UserError: There is no GPU for "cuda", or the address of rank 0 cannot be used.
        ConnectionError: The connection to rank 0 was refused or lost.
    """
    cuda = resolve_device(device, device_key).type == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            join(backend, timedelta(seconds=timeout_s), COLLECTIVE_TIMEOUT)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def build_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """Arrange all ranks of the process group as the configuration says.

    fsdp: there are replicate_size copies; each copy is sharded over world size / replicate_size ranks. An
    expert-parallel group consists of neighboring ranks of one copy. Rows are therefore exchanged inside one
    machine if the machine has enough ranks.

    ddp: every rank holds a copy. With expert parallelism each copy of the experts is spread over
    expert_parallel_size ranks.

    deepspeed: the mesh describes one copy in CPU memory and is used for checkpoints. The DeepSpeed engine
    arranges the ranks for training, in the same order.

    Args:
        parallel: The validated section of the configuration.
        device: Device of this rank.

    Returns:
        The meshes. With deepspeed, `device` of the result is the CPU.
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
    """Return the number of ranks that hold each element of a parameter or gradient.

    The number is 1 if all ranks share one copy, and larger with HSDP and ddp.
    """
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing memory with the DTensor; or a plain tensor unchanged."""
    # isinstance, not hasattr(tensor, "to_local"): torch.compile evaluates that hasattr to false.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
