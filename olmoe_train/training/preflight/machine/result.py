"""What a check of a machine returns, and what it looks at."""

import os
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.distributed as dist

from olmoe_train.config.train import TrainConfig

KIB, MIB, GIB = 2**10, 2**20, 2**30


class State(Enum):
    """How a check ended."""

    ok = "ok"
    warning = "warning"
    failed = "failed"
    skipped = "skipped"


@dataclass(frozen=True)
class Result:
    """What one check found on one rank."""

    name: str
    """Name of the check, which is that of its function."""
    state: State
    message: str
    """What was found, with the cause; of a skipped check, why it was skipped."""
    fix: str = ""
    """What to do about it."""
    values: dict[str, float] = field(default_factory=dict)
    """Numbers for the JSON file, by a name that ends with the unit."""


@dataclass(frozen=True)
class Site:
    """What the checks look at: the configuration of the run, and this rank's place in it."""

    cfg: TrainConfig
    device: torch.device
    rank: int
    world_size: int
    local_rank: int
    local_ranks: int
    """Ranks on this host."""
    errors: tuple[str, ...] = ()
    """What `olmoe train` would refuse in the configuration; without errors the run can be planned."""
    bandwidth_seconds: float = 0.0
    """Longest time for measuring bandwidths; 0: they are not measured."""

    @property
    def has_several_hosts(self) -> bool:
        return self.local_ranks < self.world_size


def site_here(
    cfg: TrainConfig, device: torch.device, errors: tuple[str, ...] = (), bandwidth_seconds: float = 0.0
) -> Site:
    """The site of this rank, from its process group and the environment variables of torchrun."""
    world = dist.get_world_size()
    return Site(
        cfg,
        device,
        dist.get_rank(),
        world,
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", world)),
        errors,
        bandwidth_seconds,
    )


def in_units(size: float) -> str:
    """Bytes as text, in binary units."""
    for unit, bytes_of in (("TiB", 2**40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= bytes_of:
            return f"{size / bytes_of:,.1f} {unit}"
    return f"{size:.0f} bytes"
