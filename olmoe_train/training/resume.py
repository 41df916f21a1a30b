"""Where a run continues: which checkpoint checkpoint.resume or branch_from asks for, and what becomes of a
damaged one."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from olmoe_train.checkpoint.branch import begin_branch, branch_checkpoint
from olmoe_train.checkpoint.directory import (
    CheckpointError,
    incomplete_checkpoints,
    latest_checkpoint,
    read_manifest,
    set_aside,
    verify,
)
from olmoe_train.checkpoint.remote import complete_steps, download_newest
from olmoe_train.checkpoint.sharded import saved_state as read_saved_state
from olmoe_train.config.train import CheckpointConfig
from olmoe_train.distributed.collectives import gather_from_all, on_rank_0
from olmoe_train.optim.skip_step import SkipGuard
from olmoe_train.run.directory import Run
from olmoe_train.training.callbacks.base import Callback
from olmoe_train.training.compatibility import BRANCH_MAY_CHANGE, check_changes
from olmoe_train.training.engine.base import Engine
from olmoe_train.training.state import TrainState
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import redact_text

log = logging.getLogger(__name__)


def resume(
    cfg: CheckpointConfig, run: Run, engine: Engine, fingerprint: dict[str, Any]
) -> dict[str, Any] | None:
    """Load the checkpoint that checkpoint.resume asks for, if there is one, into the engine.

    Without one, a branch starts from its parent. A damaged checkpoint is named and quarantined, and the one
    before it is used. fingerprint: of this run, compared with the checkpoint's. Returns the checkpoint's JSON
    state; None for a new run.

    Raises:
        UserError: checkpoint.resume names a damaged checkpoint, or this run computes something else.
    """
    while (checkpoint := checkpoint_to_resume(cfg, run)) is not None:
        try:
            check_changes(read_saved_state(checkpoint), fingerprint, cfg.allow_changes, checkpoint)
            saved = engine.load(checkpoint)
        except CheckpointError as error:
            if cfg.resume not in ("auto", "never"):
                raise UserError(
                    f"checkpoint.resume={cfg.resume}: {error}; give another checkpoint, or auto"
                ) from None
            quarantine(run.path, checkpoint, error)
            continue
        log.info("resumed from %s", checkpoint)
        if change := change_of_ranks(checkpoint, saved["config"], fingerprint["config"]):
            log.info("%s", change)
        return saved
    return branch(cfg, run, engine, fingerprint) if cfg.branch_from is not None else None


def change_of_ranks(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say that other ranks train on than those that saved the checkpoint; empty if their number is the same.

    Args:
        checkpoint: What was loaded.
        before: The configuration of the run that saved it.
        now: The configuration of this run.
    """
    ranks = dist.get_world_size()
    was = read_manifest(checkpoint).get("world_size", ranks)
    if was == ranks:
        return ""
    size = now["trainer"]["global_batch_size"]
    passes = [
        size / (count * config["trainer"]["micro_batch_size"])
        for count, config in ((was, before), (ranks, now))
    ]
    return (
        f"the number of ranks has changed from {was} to {ranks}, and the micro-batches of each rank in a "
        f"step of {size} sequences from {passes[0]:g} to {passes[1]:g}; batches and their order are the same"
    )


def branch(cfg: CheckpointConfig, run: Run, engine: Engine, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint of checkpoint.branch_from into the engine, and begin the branch in its directory.

    Returns the checkpoint's JSON state.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or this run computes something else.
    """
    assert cfg.branch_from is not None
    branch_from = cfg.branch_from
    # A newest checkpoint is the one that rank 0 sees.
    checkpoint = gather_from_all(lambda: branch_checkpoint(branch_from, run.path))[0]
    try:
        parent = read_saved_state(checkpoint)
        check_changes(parent, fingerprint, cfg.allow_changes, checkpoint, BRANCH_MAY_CHANGE)
        saved = engine.load(checkpoint)
    except CheckpointError as error:
        raise UserError(f"checkpoint.branch_from={branch_from}: {error}; give another step") from None
    on_rank_0(lambda: begin_branch(branch_from, run.path, checkpoint))
    log.info("branched from %s", checkpoint)
    return saved


def saved_state(
    state: TrainState, guard: SkipGuard, callbacks: list[Callback], fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint holds besides tensors, as JSON; collective. For dropout see seed_dropout."""
    states = {callback.name: callback.state_dict() for callback in callbacks}
    return {
        **state.saved(),
        "guard": guard.state(),
        "callbacks": {name: values for name, values in states.items() if values},
        **fingerprint,
    }


def start_callbacks(callbacks: list[Callback], saved: dict[str, Any] | None, state: TrainState) -> None:
    """Give each callback its state of the checkpoint that the run resumes from, if any; then start them."""
    if saved is not None:
        # Checkpoints from before there were callbacks hold the one state there was by itself.
        older = {"logging": {"expert_last_used": saved.get("expert_last_used")}}
        states = saved.get("callbacks", older)
        for callback in callbacks:
            if callback.name in states:
                callback.load_state_dict(states[callback.name])
    for callback in callbacks:
        callback.on_start(state)


def checkpoint_to_resume(cfg: CheckpointConfig, run: Run) -> Path | None:
    """What checkpoint.resume (auto, never, or a directory) asks for, the same on all ranks; None: nothing.

    A newer checkpoint in checkpoint.upload_to is downloaded first.
    """
    if cfg.resume not in ("auto", "never"):
        return Path(cfg.resume)
    on_rank_0(lambda: _quarantine_incomplete(run.path))
    url = cfg.upload_to
    if url is not None:
        on_rank_0(lambda: _download_newest(url, cfg.resume, run))
    found: list[Any] = [latest_checkpoint(run.path)]
    dist.broadcast_object_list(found)
    if cfg.resume == "never" and found[0] is not None:
        raise UserError(
            f"checkpoint.resume=never, but run_dir={run.path} already holds {found[0].name}: "
            "use another run_dir, delete this one, or checkpoint.resume=auto to continue it"
        )
    return found[0]


def _download_newest(url: str, choice: str, run: Run) -> None:
    if choice == "never":
        if (found := next(complete_steps(url), None)) is not None:
            raise UserError(
                f"checkpoint.resume=never, but checkpoint.upload_to={redact_text(url)} already holds step "
                f"{found[0]}: use another URL, or checkpoint.resume=auto to continue it"
            )
        return
    download_newest(url, run.path, lambda: run.watchdog.heartbeat("downloading a checkpoint"))


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
