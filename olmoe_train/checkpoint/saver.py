"""When a run saves and what follows: in the background or not, what is kept, what a failed save means."""

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
from olmoe_train.distributed.collectives import on_any_rank, on_rank_0
from olmoe_train.utils.errors import UserError

log = logging.getLogger(__name__)


class Saver:
    """Saves one checkpoint at a time, on all ranks. With checkpoint.async_save a thread of each rank writes a
    copy of its tensors, by collectives of its own, while training goes on.

    A save that fails costs nothing but itself: the next one is another chance, until checkpoint.max_failures
    in a row have failed.
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
            stored: gives the model and its optimizer with sharded tensors; collective.
            saved_step: newest step that is saved already; 0: none.
            on_save: called on rank 0 with each complete checkpoint, in the thread that saved it.
        """
        self.cfg, self.run_dir, self._stored, self._on_save = cfg, run_dir, stored, on_save
        self.group = dist.new_group(backend="gloo") if cfg.async_save else None
        # Cached, the copy is in pinned memory, which CUDA writes to several times as fast.
        stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self.stager = stager if cfg.async_save else None
        self.thread: threading.Thread | None = None
        self.saved_step = saved_step
        """The newest step that is saved; 0: none."""
        self.failure: Exception | None = None
        """Of the last save; None: it succeeded."""
        self.failures = 0
        """Failed saves in a row."""
        self._reported = 0

    def due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self.cfg.every, self.cfg.export_every))

    def save(self, step: int, state: dict[str, Any], stopping: bool = False) -> None:
        """Save `step`, once the save before it has ended; collective.

        state: JSON values, as save_checkpoint's.
        stopping: a signal leaves no time for two, so a save that is on its way is the last one.
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
        """Until no save is on its way; raises where too many have failed."""
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
        """The end of the run: its last save must have succeeded."""
        self.wait()
        if self.failure is not None:
            raise self.failure

    def must_abort(self) -> bool:
        """Tell of a save that has failed in the background, and whether the run has to end; every step."""
        self.report()
        return self.failed_too_often

    @property
    def failed_too_often(self) -> bool:
        """Whether the run has to end. Ranks may learn it at different steps, but by `wait` they all have."""
        return self._needs_user or self.failures >= self.cfg.max_failures

    @property
    def _needs_user(self) -> bool:
        """Whether the last save failed for a reason that stays until somebody does something."""
        return isinstance(self.failure, UserError) and not isinstance(self.failure, CheckpointError)

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def report(self) -> None:
        """Tell of a save that has failed since the last call."""
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
        """Delete what retention gives up, if the newest checkpoint reads back as it was written; else set
        that aside."""
        found = [superseded(self.run_dir, self.cfg.keep, self.cfg.keep_every)]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if found[0]:
            try:
                verify_together(newest, self.group)
            except CheckpointError:
                on_rank_0(lambda: set_aside(newest), self.group)
                raise
            on_rank_0(lambda: delete(found[0]), self.group)
