"""The list of checks: all of them for `olmoe doctor`, and those that take milliseconds for every start."""

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.distributed.rendezvous import place_of, time_limit
from olmoe_train.training.preflight.machine.bandwidth import bandwidth
from olmoe_train.training.preflight.machine.gpus import cuda, gpu_links, gpu_memory
from olmoe_train.training.preflight.machine.network import hub, ports, wandb
from olmoe_train.training.preflight.machine.resources import (
    disk_space,
    locked_memory,
    open_files,
    run_directory,
    shared_memory,
)
from olmoe_train.training.preflight.machine.result import Result, Site, State, site_here
from olmoe_train.training.preflight.machine.together import clocks, data, shared_files
from olmoe_train.training.preflight.machine.versions import dependencies, same_versions, versions
from olmoe_train.utils.errors import UserError

Check = Callable[[Site], list[Result]]

ON_RANK_0: tuple[Check, ...] = (ports, wandb)
ON_HOSTS: tuple[Check, ...] = (
    versions,
    dependencies,
    cuda,
    gpu_links,
    open_files,
    locked_memory,
    shared_memory,
    run_directory,
    disk_space,
    hub,
)
"""Checks of a host, made by its first rank."""
ON_RANKS: tuple[Check, ...] = (gpu_memory,)
TOGETHER: tuple[Check, ...] = (same_versions, data, clocks, shared_files, bandwidth)
"""Checks that all ranks make together."""
AT_START: tuple[Check, ...] = (versions, open_files, shared_memory, disk_space)
"""Of ON_HOSTS, those of every start of a training. Run (run/directory.py) itself writes to run_dir first."""

LIMIT_S = 120.0
"""Longest time for one of the checks that ranks make together, beyond that of measuring."""


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


def run_checks(site: Site) -> list[Finding]:
    """Make all checks. Collective; the same on all ranks."""
    results = [] if site.rank else configuration(site)
    for checks, is_here in (
        (ON_RANK_0, site.rank == 0),
        (ON_HOSTS, site.local_rank == 0),
        (ON_RANKS, True),
    ):
        for check in checks:
            results += guarded(check, site) if is_here else []
    for check in TOGETHER:
        with time_limit(LIMIT_S + site.bandwidth_seconds, lambda check=check: _say_stuck(check, site)):
            results += guarded(check, site)
    return findings(gather_from_all(lambda: (socket.gethostname(), results)))


def configuration(site: Site) -> list[Result]:
    """`olmoe train` accepts the configuration on this number of ranks."""
    if site.errors:
        fix = "`olmoe train` refuses it; the message says what to set"
        return [Result("configuration", State.failed, error, fix) for error in site.errors]
    ranks = f"{site.world_size} rank{'s' * (site.world_size != 1)}"
    return [Result("configuration", State.ok, f"accepted on {ranks}")]


def guarded(check: Check, site: Site) -> list[Result]:
    """Make a check. An error of the check itself becomes a warning."""
    try:
        return check(site)
    except Exception as error:
        name = getattr(check, "__name__", "check")
        what = f"the check itself failed: {type(error).__name__}: {error}"
        return [Result(name, State.warning, what, "report it, with this line")]


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


def start_warnings(cfg: TrainConfig) -> list[str]:
    """The short form, for every start of a training: warnings. Collective.

    Raises:
        UserError: The run would fail on these machines; the message names host, rank, cause and fix.
    """
    site = site_here(cfg, resolve_device(cfg.trainer.device))
    checks = () if site.local_rank else AT_START

    def bad() -> tuple[str, list[Result]]:
        results = [result for check in checks for result in guarded(check, site)]
        return socket.gethostname(), [one for one in results if one.state in (State.warning, State.failed)]

    found = findings(gather_from_all(bad))
    texts: dict[State, list[str]] = {State.failed: [], State.warning: []}
    for one in found:
        texts[one.result.state].append(f"{one.place}: {one.result.message}; {one.result.fix}")
    if failed := texts[State.failed]:
        raise UserError("\n  - ".join(["the run would fail here (see `olmoe doctor`):", *failed]))
    return texts[State.warning]


def ranges(numbers: list[int]) -> str:
    """Numbers in ascending order as text: 0-3, 6."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _say_stuck(check: Check, site: Site) -> None:
    name = getattr(check, "__name__", "check")
    text = f"error: {place_of(site.rank)} waited {LIMIT_S + site.bandwidth_seconds:g} s in the check {name}"
    print(f"{text}: another rank has ended, or the network between hosts is cut", file=sys.stderr)
