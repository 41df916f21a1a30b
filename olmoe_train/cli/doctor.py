"""Check the machines of a training run: versions, GPUs, limits, disk, shared files, clocks, bandwidth.

It takes the keys of `olmoe train`, and is started as the training is: on the same hosts, with as many ranks.
It writes nothing but a temporary directory in run_dir. It exits with 2 if a check failed; warnings do not
fail.
"""

import json
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from olmoe_train.cli.app import run_verb
from olmoe_train.cli.help import description
from olmoe_train.cli.ranks import end_process, on_ranks
from olmoe_train.config.doctor import DoctorConfig
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT, OK

if TYPE_CHECKING:
    import torch

    from olmoe_train.training.preflight.machine.result import Finding


def main(cfg: DoctorConfig) -> int:
    """Make the checks, print them on rank 0, and return the exit code."""
    if cfg.bandwidth_seconds < 0:
        raise UserError(f"bandwidth_seconds={cfg.bandwidth_seconds:g}: must not be negative; 0: not measured")
    # Imported here, because they import torch.
    from olmoe_train.distributed.mesh import init_distributed
    from olmoe_train.distributed.rendezvous import leave_distributed

    device = init_distributed(cfg.trainer.device.value, cfg.trainer.rendezvous_timeout)
    try:
        return examine(cfg, device)
    finally:
        leave_distributed(cfg.trainer.rendezvous_timeout)


def examine(cfg: DoctorConfig, device: "torch.device") -> int:
    """`main` within a process group. device: that of this rank."""
    import torch.distributed as dist

    from olmoe_train.distributed.collectives import on_rank_0
    from olmoe_train.training.preflight.checks import configuration_errors
    from olmoe_train.training.preflight.machine.checks import run_checks
    from olmoe_train.training.preflight.machine.result import State, site_here
    from olmoe_train.utils.files import write_out

    cfg = with_length(cfg)
    ranks = dist.get_world_size()
    errors = tuple(configuration_errors(cfg, ranks))
    found = run_checks(site_here(cfg, device, errors, cfg.bandwidth_seconds))
    if dist.get_rank() == 0:
        print(f"{ranks} rank{'s' * (ranks != 1)} on {hosts(found)}; device {device.type}")
        print("\n".join(lines(found)), flush=True)
    if cfg.out is not None:
        out = Path(cfg.out).expanduser()
        on_rank_0(lambda: write_out(out, as_json(found, ranks, device.type)))
    return BAD_INPUT if any(one.result.state is State.failed for one in found) else OK


def with_length(cfg: DoctorConfig) -> DoctorConfig:
    """A configuration that has a length: without one, a run up to its first checkpoint is checked, so that
    `olmoe doctor` works without any key."""
    trainer = cfg.trainer
    if (trainer.max_steps, trainer.max_tokens, trainer.max_epochs) != (None, None, None):
        return cfg
    return replace(cfg, trainer=replace(trainer, max_steps=cfg.checkpoint.every or 1))


def as_json(found: "list[Finding]", ranks: int, device: str) -> str:
    """What the file `out` holds."""
    results = [{"places": one.places, **asdict(one.result), "state": one.result.state.value} for one in found]
    return json.dumps({"ranks": ranks, "device": device, "results": results}, indent=2) + "\n"


def hosts(found: "list[Finding]") -> str:
    """The names of the hosts."""
    return ", ".join(sorted({host for one in found for host in one.places}))


def lines(found: "list[Finding]") -> list[str]:
    """A line per result, with its place if it is bad or if ranks differ, and its fix; then the counts."""
    printed, places = [], Counter(one.result.name for one in found)
    for one in found:
        result, state = one.result, one.result.state.value
        where = f"{one.place}: " if result.fix or places[result.name] > 1 else ""
        printed.append(f"{state:<8} {result.name:<14} {where}{result.message}")
        printed += [f"{'':<23} fix: {result.fix}"] if result.fix else []
    states = Counter(one.result.state.value for one in found)
    names = ("failed", "warning", "ok", "skipped")
    return [*printed, ", ".join(f"{states[name]} {name}" for name in names)]


def run() -> int:
    """Run `olmoe doctor` with the command line; returns the exit code."""
    return on_ranks(
        "olmoe_train.cli.doctor",
        partial(run_verb, "doctor", DoctorConfig, main, description("doctor", __doc__)),
    )


if __name__ == "__main__":
    end_process(run())
