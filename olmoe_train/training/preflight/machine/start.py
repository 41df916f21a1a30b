"""The checks of every start of a training: those of `olmoe doctor` that take milliseconds and no network.

What only `olmoe doctor` needs is not imported here.
"""

import socket

from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.training.preflight.machine.resources import disk_space, open_files, shared_memory
from olmoe_train.training.preflight.machine.result import Check, Result, State, findings, guarded, site_here
from olmoe_train.training.preflight.machine.versions import versions
from olmoe_train.utils.errors import UserError

AT_START: tuple[Check, ...] = (versions, open_files, shared_memory, disk_space)
"""Made by the first rank of each host. That run_dir can be written, Run finds (run/directory.py)."""


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
