"""Save checkpoints during a run: when to save, saving in the background, retention, and failed saves."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from olmoe_train.checkpoint.directory import CheckpointError, delete, set_aside, superseded
from olmoe_train.checkpoint.sharded import Snapshot, take_snapshot, verify_together, write_checkpoint
from olmoe_train.config.train import CheckpointConfig
from olmoe_train.distributed.collectives import group_of_all_ranks, on_any_rank, on_rank_0
from olmoe_train.utils.errors import UserError

log = logging.getLogger(__name__)


class Saver:
    """Saves one checkpoint at a time, on all ranks.

    With checkpoint.async_save, a thread of each rank writes a copy of the rank's tensors while training
    continues. The threads use their own process group for collectives.

    A failed save does not end the run. The run ends when checkpoint.max_failures saves in a row have failed.
    """

    def __init__(
        self,
        cfg: CheckpointConfig,
        run_dir: Path,
        stored: Callable[[], tuple[nn.Module, torch.optim.Optimizer]],
        saved_step: int,
        on_save: Callable[[Path], None] = lambda checkpoint: None,
    ) -> None:
        """
        Args:
            cfg: The `checkpoint` section of the configuration.
            run_dir: The run's directory.
            stored: Returns the model and its optimizer with sharded tensors. Collective.
            saved_step: Newest step that is already saved. 0 means that no step is saved.
            on_save: Called on rank 0 with each complete checkpoint, in the thread that saved the checkpoint.
        """
        self.cfg, self.run_dir, self._stored, self._on_save = cfg, run_dir, stored, on_save
        self.group = group_of_all_ranks() if cfg.async_save else None
        # A cached copy is in pinned memory. CUDA copies to pinned memory several times as fast.
        stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self.stager = stager if cfg.async_save else None
        self.thread: threading.Thread | None = None
        self.saved_step = saved_step
        """Newest step that is saved. 0 means that no step is saved."""
        self.failure: Exception | None = None
        """Error of the last save, or None if the last save succeeded."""
        self.failures = 0
        """Number of saves in a row that failed."""
        self._reported = 0

    def due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self.cfg.every, self.cfg.export_every))

    def save(self, step: int, state: dict[str, Any], stopping: bool = False) -> None:
        """Wait for the previous save to end, then save `step`. Collective.

        Args:
            step: The step to save.
            state: JSON values, as for `save_checkpoint`.
            stopping: A signal asked the run to stop, and there may be no time for two saves. If a save is in
                progress and succeeds, `step` is not saved.

        Raises:
            Exception: Too many saves have failed. See `wait`.
        """
        last = stopping and on_any_rank(self.busy)
        self.wait()
        if last and self.failure is None:
            return
        snapshot = take_snapshot(*self._stored(), self.stager)
        work = partial(self._save, step, snapshot, state)
        if self.cfg.async_save:
            self.thread = threading.Thread(target=work, name=f"save step {step}")
            self.thread.start()
        else:
            work()
            self.wait()

    def wait(self) -> None:
        """Wait until no save is in progress.

        Raises:
            UserError: The last save failed for a reason that remains until the user acts.
            RuntimeError: checkpoint.max_failures saves in a row failed.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.report()
        if self.failed_too_often:
            assert self.failure is not None
            if self._needs_user:
                raise self.failure
            raise RuntimeError(f"{self.failures} saves failed in a row, the last one with: {self.failure}")

    def finish(self) -> None:
        """Wait for the last save at the end of the run, and raise its error if the save failed."""
        self.wait()
        if self.failure is not None:
            raise self.failure

    def must_abort(self) -> bool:
        """Report a save that failed in the background, and return whether the run must end.

        Called at every step.
        """
        self.report()
        return self.failed_too_often

    @property
    def failed_too_often(self) -> bool:
        """Whether the run must end because of failed saves.

        Ranks may see this at different steps. After `wait` all ranks have the same value.
        """
        return self._needs_user or self.failures >= self.cfg.max_failures

    @property
    def _needs_user(self) -> bool:
        """Whether the last save failed for a reason that remains until the user acts."""
        return isinstance(self.failure, UserError) and not isinstance(self.failure, CheckpointError)

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def report(self) -> None:
        """Log a warning if a save has failed since the last call, unless the failure ends the run."""
        if self.failures > self._reported and not self.failed_too_often:
            log.warning(
                "WARNING: saving failed, %d of at most %d times in a row; training goes on: %s",
                self.failures,
                self.cfg.max_failures,
                self.failure,
            )
        self._reported = self.failures

    def _save(self, step: int, snapshot: Snapshot, state: dict[str, Any]) -> None:
        try:
            checkpoint = write_checkpoint(self.run_dir, step, snapshot, state, self.group)
            self._retire(checkpoint)
            self.saved_step, self.failure, self.failures = step, None, 0
        except Exception as error:
            self.failure, self.failures = error, self.failures + 1
        else:
            if dist.get_rank() == 0:
                self._on_save(checkpoint)

    def _retire(self, newest: Path) -> None:
        """Delete the checkpoints that retention no longer keeps.

        Before anything is deleted, the newest checkpoint is verified. If it is damaged, it is renamed and
        nothing is deleted.
        """
        found = [superseded(self.run_dir, self.cfg.keep, self.cfg.keep_every)]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if found[0]:
            try:
                verify_together(newest, self.group)
            except CheckpointError:
                on_rank_0(lambda: set_aside(newest), self.group)
                raise
            on_rank_0(lambda: delete(found[0]), self.group)
