"""Where a run continues: which checkpoint checkpoint.resume asks for, and what becomes of a damaged one."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from olmoe_train.checkpoint.directory import (
    CheckpointError,
    complete_checkpoints,
    incomplete_checkpoints,
    set_aside,
    verify,
)
from olmoe_train.checkpoint.sharded import load_checkpoint, saved_state
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.collectives import on_rank_0
from olmoe_train.optim.skip_step import StepGuard
from olmoe_train.run.directory import RunDirectory
from olmoe_train.training.compatibility import check_changes
from olmoe_train.training.metrics import StepMetrics
from olmoe_train.training.state import Progress
from olmoe_train.utils.errors import UserError

log = logging.getLogger("olmoe")


def resume(
    cfg: TrainConfig, run: RunDirectory, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Load the checkpoint that checkpoint.resume asks for, if there is one; where the run stands.

    A damaged one is named and set aside, and the one before it is used.
    """
    for checkpoint in checkpoints_to_resume(run.path, cfg.checkpoint.resume):
        try:
            check_changes(saved_state(checkpoint), cfg, checkpoint)
            state = load_checkpoint(checkpoint, model, optimizer)
        except CheckpointError as error:
            quarantine(run.path, checkpoint, error)
            continue
        log.info("resumed from %s", checkpoint)
        return Progress.from_json(state)
    return Progress()


def checkpoints_to_resume(run_dir: Path, choice: str) -> list[Path]:
    """What checkpoint.resume (auto, never, or a directory) asks for, newest first; the same on all ranks."""
    if choice not in ("auto", "never"):
        return [Path(choice)]
    on_rank_0(lambda: _quarantine_incomplete(run_dir))
    found: list[Any] = [complete_checkpoints(run_dir)]
    dist.broadcast_object_list(found)
    if choice == "never" and found[0]:
        raise UserError(
            f"checkpoint.resume=never, but run_dir={run_dir} already holds {found[0][0].name}: "
            "use another run_dir, delete this one, or checkpoint.resume=auto to continue it"
        )
    return found[0]


def quarantine(run_dir: Path, checkpoint: Path, error: Exception) -> None:
    """Report a damaged checkpoint, and move it out of the way of the next save of its step."""
    log.warning("WARNING: %s; it is set aside and the checkpoint before it is used", error)
    if checkpoint.parent == run_dir / "checkpoints":
        on_rank_0(lambda: set_aside(checkpoint))


def _quarantine_incomplete(run_dir: Path) -> None:
    for checkpoint in incomplete_checkpoints(run_dir):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            log.warning("WARNING: %s; it is set aside as %s", error, set_aside(checkpoint).name)


def training_state(
    described: dict[str, Any], progress: Progress, metrics: StepMetrics, guard: StepGuard
) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, as JSON: `described`, of the run, and where it stands;
    collective. No generator's state: seed_dropout."""
    state = replace(progress, expert_last_used=metrics.last_used(), guard=guard.state())
    return asdict(state) | described
