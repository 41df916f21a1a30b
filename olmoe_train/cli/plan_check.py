"""`olmoe plan check=true`: build the run on fake ranks, and say of each part what was found."""

import os
import shutil
from pathlib import Path

from olmoe_train.config.choices import ActivationCheckpointing
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.gpus import gpu_memory_gib
from olmoe_train.planning.report import (
    GB,
    GIB,
    fits,
    largest_micro_batch,
    plan_layout,
    plan_memory,
    plan_micro_batch,
)
from olmoe_train.training.preflight.branch import branch_errors
from olmoe_train.training.preflight.checks import configuration_errors, run_errors, run_warnings
from olmoe_train.training.preflight.fake_run.batches import missing_data
from olmoe_train.training.preflight.fake_run.parts import ERROR, OK, as_train_config, built_parts
from olmoe_train.training.preflight.parallel import deepspeed_file_errors
from olmoe_train.utils.errors import configuration_error

NO_DATA = "none"
"""data.dir in configs/plan.yaml."""
WIDTH = len("configuration")


def check_run(cfg: PlanConfig) -> None:
    """Print one line per part of the run, and warnings.

    Raises:
        UserError: The run would fail; the message lists everything that is wrong.
    """
    print(f"check on {cfg.gpus} fake ranks: nothing is sent, and no value is computed")
    missing = missing_data(cfg)
    errors, warnings = configuration_problems(cfg, missing is None)
    if errors:
        raise configuration_error(errors)
    data = f"data read from data.dir={cfg.data.dir}"
    if missing is not None:
        data = "no data, because " + (
            "data.dir is not given" if cfg.data.dir == NO_DATA else f"{missing} does not exist"
        )
    _print("configuration", OK, f"all keys; {data}")
    for line in warnings:
        print(f"  warning: {line}")
    errors = memory_errors(cfg)
    _print("memory", ERROR if errors else OK, "" if errors else memory_in_words(cfg))
    for part in built_parts(as_train_config(cfg), cfg.gpus, missing is None):
        _print(part.name, part.state, part.text if part.state != ERROR else "")
        errors += [part.text] if part.state == ERROR else []
        if warning := disk_warning(cfg, part.bytes_kept):
            print(f"  warning: {warning}")
    if errors:
        raise configuration_error(errors)


def _print(name: str, state: str, text: str) -> None:
    print(f"  {name:<{WIDTH}}  {state}{': ' if text else ''}{text}", flush=True)


def configuration_problems(cfg: PlanConfig, has_data: bool) -> tuple[list[str], list[str]]:
    """The errors of the preflight checks of training, but for what this machine lacks, and their warnings."""
    if has_data:
        errors, manifests = run_errors(cfg, cfg.gpus, on_this_machine=False)
    else:
        errors, manifests = configuration_errors(cfg, cfg.gpus), {}
        errors += [] if errors else deepspeed_file_errors(cfg, cfg.gpus) + branch_errors(cfg)
    errors += directory_errors(cfg.run_dir)
    return errors, [] if errors else run_warnings(cfg, cfg.gpus, manifests)


def directory_errors(run_dir: str) -> list[str]:
    """Whether the run can write its directory, as far as this machine has it."""
    nearest = nearest_directory(run_dir)
    if not nearest.is_dir():
        return [f"run_dir={run_dir}: {nearest} is a file, and checkpoints need a directory; give another one"]
    if _is_here(run_dir) and not os.access(nearest, os.W_OK | os.X_OK):
        what = f"{nearest} is not writable, and checkpoints are written there"
        return [f"run_dir={run_dir}: {what}; give another run_dir, or change the permissions"]
    return []


def nearest_directory(run_dir: str) -> Path:
    """The run directory, or the nearest one above it that exists."""
    path = Path(run_dir).expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def _is_here(run_dir: str) -> bool:
    """Whether the run directory, or the one it is made in, is on this machine. A run may be checked on
    another machine than it trains on."""
    path = Path(run_dir).expanduser().absolute()
    return nearest_directory(run_dir) in (path, path.parent)


def disk_warning(cfg: PlanConfig, bytes_kept: int) -> str | None:
    """A warning if the disk of run_dir has no room for the checkpoints that are kept."""
    if not bytes_kept or not _is_here(cfg.run_dir):
        return None
    free = shutil.disk_usage(nearest_directory(cfg.run_dir)).free
    if free >= bytes_kept:
        return None
    needed = f"checkpoint.keep={cfg.checkpoint.keep} needs {bytes_kept / GB:,.1f} GB"
    return f"run_dir={cfg.run_dir}: its disk has {free / GB:,.1f} GB free, and {needed}"


def memory_errors(cfg: PlanConfig) -> list[str]:
    """Whether a rank fits in its GPU by the plan, at an even load of the experts."""
    layout, batch = plan_layout(cfg), plan_micro_batch(cfg)
    if fits(cfg, plan_memory(cfg, layout, batch)[0]):
        return []
    most = largest_micro_batch(cfg, layout, batch) // cfg.objective.sequences_per_sample
    fixes = [f"set trainer.micro_batch_size={most}"] if most else ["use more gpus"]
    if cfg.trainer.activation_checkpointing is not ActivationCheckpointing.full:
        fixes.append("set trainer.activation_checkpointing=full")
    memory = f"gpu_memory_gib={gpu_memory_gib(cfg):g}"
    key = f"{memory} with trainer.micro_batch_size={cfg.trainer.micro_batch_size}"
    return [f"{key}: by the plan a rank needs {memory_in_words(cfg)}; {', or '.join(fixes)}"]


def memory_in_words(cfg: PlanConfig) -> str:
    """The memory of the fullest rank, and what there is."""
    needed = plan_memory(cfg, plan_layout(cfg), plan_micro_batch(cfg))[0].total
    return f"{needed / GIB:,.2f} GiB, of {gpu_memory_gib(cfg):g} - {cfg.reserve_gib:g} GiB in a GPU"
