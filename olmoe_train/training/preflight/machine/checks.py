"""The list of all checks, for `olmoe doctor`. start.py has those of every start of a training."""

import socket
import sys
from functools import partial

from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.distributed.rendezvous import place_of, time_limit
from olmoe_train.training.preflight.machine.bandwidth import bandwidth
from olmoe_train.training.preflight.machine.gpus import cuda, gpu_links, gpu_memory
from olmoe_train.training.preflight.machine.links import links
from olmoe_train.training.preflight.machine.network import hub, ports, wandb
from olmoe_train.training.preflight.machine.resources import (
    disk_space,
    locked_memory,
    open_files,
    run_directory,
    shared_memory,
)
from olmoe_train.training.preflight.machine.result import (
    Check,
    Finding,
    Result,
    Site,
    State,
    findings,
    guarded,
)
from olmoe_train.training.preflight.machine.together import clocks, data, shared_files
from olmoe_train.training.preflight.machine.versions import dependencies, same_versions, versions

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
TOGETHER: tuple[Check, ...] = (same_versions, data, clocks, shared_files, links, bandwidth)
"""Checks that all ranks make together."""
LIMIT_S = 120.0
"""Longest time for one of the checks that ranks make together, beyond that of measuring."""


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
        with time_limit(LIMIT_S + site.bandwidth_seconds, partial(_say_stuck, check, site)):
            results += guarded(check, site)
    return findings(gather_from_all(lambda: (socket.gethostname(), results)))


def configuration(site: Site) -> list[Result]:
    """`olmoe train` accepts the configuration on this number of ranks."""
    if site.errors:
        fix = "`olmoe train` refuses it; the message says what to set"
        return [Result("configuration", State.failed, error, fix) for error in site.errors]
    ranks = f"{site.world_size} rank{'s' * (site.world_size != 1)}"
    return [Result("configuration", State.ok, f"accepted on {ranks}")]


def _say_stuck(check: Check, site: Site) -> None:
    name = getattr(check, "__name__", "check")
    text = f"error: {place_of(site.rank)} waited {LIMIT_S + site.bandwidth_seconds:g} s in the check {name}"
    print(f"{text}: another rank has ended, or the network between hosts is cut", file=sys.stderr)
