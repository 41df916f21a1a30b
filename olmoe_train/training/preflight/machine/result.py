"""What a check of a machine looks at and returns, and the results of all ranks together."""

import os
from collections.abc import Callable, Mapping
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
    values: Mapping[str, float] = field(default_factory=dict)
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


Check = Callable[[Site], list[Result]]


def guarded(check: Check, site: Site) -> list[Result]:
    """Make a check. An error of the check itself becomes a warning."""
    try:
        return check(site)
    except Exception as error:
        name = getattr(check, "__name__", "check")
        what = f"the check itself failed: {type(error).__name__}: {error}"
        return [Result(name, State.warning, what, "report it, with this line")]


@dataclass(frozen=True)
class Finding:
    """A result, and who found it."""

    places: dict[str, list[int]]
    """Host -> its ranks, in ascending order."""
    result: Result

    @property
    def place(self) -> str:
        """Hosts and ranks as text."""
        return "; ".join(
            f"host {host}, rank{'s' * (len(ranks) > 1)} {ranges(ranks)}"
            for host, ranks in self.places.items()
        )


def findings(of_ranks: list[tuple[str, list[Result]]]) -> list[Finding]:
    """Merge the results of ranks that differ at most in their numbers; in the order of the checks.

    Args:
        of_ranks: Host and results of each rank.
    """
    found: dict[tuple[str, State, str, str], Finding] = {}
    for rank, (host, results) in enumerate(of_ranks):
        for result in results:
            key = (result.name, result.state, result.message, result.fix)
            places = found.setdefault(key, Finding({}, result)).places
            places.setdefault(host, []).append(rank)
    order = list(dict.fromkeys(one.result.name for one in found.values()))
    return sorted(found.values(), key=lambda one: order.index(one.result.name))


def ranges(numbers: list[int]) -> str:
    """Numbers in ascending order as text: 0-3, 6."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
