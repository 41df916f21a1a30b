"""Branches: runs that start from a checkpoint of another run, their parent, in a directory of their own.

run_dir/branch.json of a branch says where it began. The parent's directory is only read.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from olmoe_train.checkpoint.convert.stored_model import split_step
from olmoe_train.checkpoint.directory import (
    checkpoint_path,
    complete_checkpoints,
    is_complete,
    latest_checkpoint,
    step_of,
)
from olmoe_train.run.loggers import copy_records
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_write_text

BRANCH, METRICS = "branch.json", "metrics.jsonl"


@dataclass(frozen=True)
class Origin:
    """Where a branch began; kept in run_dir/branch.json."""

    branch_from: str
    """checkpoint.branch_from, as it was given."""
    step: int
    """Step of the parent's checkpoint, the last step that the branch shares with its parent."""


def read_origin(run_dir: Path) -> Origin | None:
    """Return where a run branched from another one, or None if it is not a branch.

    Raises:
        UserError: branch.json is damaged.
    """
    path = Path(run_dir) / BRANCH
    try:
        return Origin(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: it must hold branch_from and step") from None


def check_directory(branch_from: str, run_dir: Path) -> None:
    """Check that a branch may be made, or continued, in a run directory.

    Raises:
        UserError: The directory is the parent's, that of another branch, or that of another run.
    """
    key, fix = f"checkpoint.branch_from={branch_from}", "give this branch a run_dir of its own"
    parent = Path(split_step(branch_from)[0]).expanduser()
    if parent.resolve() == run_dir.resolve():
        raise UserError(f"{key}: run_dir={run_dir} is the parent, which is only read; {fix}")
    origin = read_origin(run_dir)
    if origin is not None and origin.branch_from != branch_from:
        raise UserError(
            f"{key}: run_dir={run_dir} already holds the branch with checkpoint.branch_from="
            f"{origin.branch_from}; {fix}, or restore that value to continue the other one"
        )
    holds_run = (run_dir / METRICS).exists() or latest_checkpoint(run_dir) is not None
    if origin is None and holds_run:
        raise UserError(f"{key}: run_dir={run_dir} already holds another run; {fix}")


def branch_checkpoint(branch_from: str, run_dir: Path) -> Path:
    """Return the checkpoint that a branch starts from.

    Args:
        branch_from: RUN@STEP, or RUN for the newest complete checkpoint of that run.
        run_dir: The branch's directory. If the branch began there before, the step is the one of that time.

    Raises:
        UserError: There is no such run, or it has no complete checkpoint of this step.
    """
    key = f"checkpoint.branch_from={branch_from}"
    name, step = split_step(branch_from)
    parent = Path(name).expanduser()
    origin = read_origin(run_dir)
    if origin is not None and origin.branch_from == branch_from:
        step = str(origin.step)
    if not parent.is_dir():
        raise UserError(f"{key}: there is no run directory {parent}; give RUN_DIR@STEP")
    newest = latest_checkpoint(parent)
    if newest is None:
        raise UserError(f"{key}: no complete checkpoint in {parent / 'checkpoints'}")
    if step is None:
        return newest
    if not step.isdecimal():
        raise UserError(f"{key}: {step} is no step; give RUN_DIR@STEP with a number")
    checkpoint = checkpoint_path(parent, int(step))
    if not is_complete(checkpoint):
        steps = ", ".join(str(step_of(path)) for path in reversed(complete_checkpoints(parent)))
        raise UserError(
            f"{key}: {checkpoint} is not a complete checkpoint; the complete steps of {parent} are {steps}"
        )
    return checkpoint


def begin_branch(branch_from: str, run_dir: Path, checkpoint: Path) -> None:
    """Write branch.json, and give the branch the parent's metrics up to the checkpoint's step.

    A branch that began before and has no checkpoint yet keeps its own metrics.
    """
    step = step_of(checkpoint)
    # First, so that a start that is killed here finds a branch and not another run.
    atomic_write_text(run_dir / BRANCH, json.dumps(asdict(Origin(branch_from, step))) + "\n")
    if not (run_dir / METRICS).exists():
        copy_records(checkpoint.parents[1] / METRICS, run_dir / METRICS, step)


def checkpoint_before(run_dir: Path, step: int) -> Path | None:
    """Return the newest complete checkpoint before a step, which of a branch may be its parent's.

    None: there is none, and the run began with initial weights.

    Raises:
        UserError: The step is the parent's, or the parent's checkpoint is needed and gone.
    """
    own = next((path for path in complete_checkpoints(run_dir) if step_of(path) < step), None)
    origin = read_origin(run_dir)
    if own is not None or origin is None:
        return own
    if step <= origin.step:
        raise UserError(
            f"step={step}: {run_dir} branched from {origin.branch_from} after step {origin.step}; ask for a "
            f"step up to there from {split_step(origin.branch_from)[0]}"
        )
    return branch_checkpoint(origin.branch_from, run_dir)
