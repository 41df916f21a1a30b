"""Checks of checkpoint.branch_from: the checkpoint of the other run, the run directory, and the schedule."""

from pathlib import Path
from typing import Any

from olmoe_train.checkpoint.branch import branch_checkpoint, check_directory
from olmoe_train.checkpoint.directory import latest_checkpoint, step_of
from olmoe_train.checkpoint.sharded import saved_state
from olmoe_train.config.choices import Schedule
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.planning.duration import warmup_and_decay_steps
from olmoe_train.training.preflight.schedule import known_last_step
from olmoe_train.utils.errors import UserError


def branch_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with a branch, one message per error. The parent is not read if the branch resumes."""
    branch_from, resume = cfg.checkpoint.branch_from, cfg.checkpoint.resume
    if branch_from is None:
        return []
    key = f"checkpoint.branch_from={branch_from}"
    if resume not in ("auto", "never"):
        what = "both name a checkpoint to start from; set checkpoint.resume=auto to branch"
        return [f"{key} and checkpoint.resume={resume}: {what}"]
    try:
        check_directory(branch_from, Path(cfg.run_dir))
        checkpoint = _checkpoint_to_branch_from(cfg)
    except UserError as error:
        return [str(error)]
    last_step = known_last_step(cfg)
    if checkpoint is not None and last_step is not None and last_step <= step_of(checkpoint):
        what = f"the branch begins after step {step_of(checkpoint)}, and the run ends at step {last_step}"
        fix = "raise trainer.max_steps or max_tokens, which count from the first step of the parent"
        return [f"{key}: {what}; {fix}"]
    return []


def branch_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about a branch that begins in the decay of its parent, or in its own warm-up or decay."""
    checkpoint = _checkpoint_to_branch_from(cfg)
    if checkpoint is None:
        return []
    key, step, warnings = f"checkpoint.branch_from={cfg.checkpoint.branch_from}", step_of(checkpoint), []
    of_parent = _decay_start_of_parent(saved_state(checkpoint))
    if of_parent is not None and of_parent < step:
        warnings.append(
            f"{key}: the parent is in its decay at step {step}; that begins after step {of_parent:,.10g}, so "
            "a stable checkpoint is one up to there"
        )
    last_step = known_last_step(cfg)
    if last_step is None:
        return warnings
    sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
    warmup_end, start, end = warmup_and_decay_steps(cfg.scheduler, sizes, last_step)
    if warmup_end > step:
        warnings.append(
            f"{key}: the warm-up of this run ends at step {warmup_end:,.10g}, after step {step}; to go on at "
            "the peak, set scheduler.warmup_steps to the warm-up of the parent"
        )
    if cfg.scheduler.kind is Schedule.wsd and start < step and start != of_parent:
        warnings.append(
            f"{key}: the decay of this run, from step {start:,.10g} to {end:,.10g}, begins before step "
            f"{step}, so that its first part is left out; for a whole decay, set "
            f"scheduler.decay_length_steps to at most {end - step:,.10g}, or make the run longer"
        )
    return warnings


def _checkpoint_to_branch_from(cfg: TrainConfig) -> Path | None:
    """The parent's checkpoint; None: the run is no branch, or it resumes from a checkpoint of its own."""
    if cfg.checkpoint.branch_from is None or latest_checkpoint(Path(cfg.run_dir)) is not None:
        return None
    return branch_checkpoint(cfg.checkpoint.branch_from, Path(cfg.run_dir))


def _decay_start_of_parent(saved: dict[str, Any]) -> float | None:
    """Step at which the decay of a checkpoint's run begins; None: its learning rate does not decay."""
    if saved["config"]["scheduler"]["kind"] == Schedule.constant.name:
        return None
    steps = saved["schedule"]
    start: float = steps.get("step at which the decay begins", steps["step at which the warm-up ends"])
    return start
