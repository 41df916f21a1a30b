"""A run with failures, event by event: its clock is simulated, its checkpoint directories are real."""

import json
import random
import shutil
from pathlib import Path

from olmoe_train.checkpoint.directory import (
    MANIFEST,
    STATE,
    checkpoint_path,
    complete_checkpoints,
    delete,
    entry_of,
    incomplete_checkpoints,
    set_aside,
    step_of,
    superseded,
    verify,
)
from olmoe_train.planning.goodput import Failures, Save

KEPT = 2  # checkpoint.keep
SHARD = "shard-00001-model-00001-of-00001.safetensors"


class SimulatedRun:
    """Saves after every `every` steps, and goes on from the newest complete checkpoint after each failure.

    Failures come at a constant rate, at any time: in steps, in saves and in restarts. Which checkpoint is the
    newest complete one, what is set aside and what is deleted is decided by checkpoint/directory.py, from the
    files that are there. A failure in a save leaves one of three kinds of incomplete directories behind.
    """

    def __init__(
        self, run_dir: Path, step_seconds: float, every: int, save: Save, failures: Failures, seed: int
    ) -> None:
        self.run_dir, self.every, self.interval = run_dir, every, every * step_seconds
        self.save, self.of = save, failures
        self.draw = random.Random(seed)
        self.clock, self.next_failure = 0.0, self._until_failure()
        self.failures = self.torn = 0
        self.finished: list[int] = []
        """Steps whose save came to its end."""

    def run_until(self, end: float) -> None:
        """Train until the clock is at `end`."""
        while self.clock < end:
            if not self._passes(self.of.restart):
                continue
            self._train(self._resume(), end)

    def _until_failure(self) -> float:
        return self.draw.expovariate(1 / self.of.mean_between)

    def _passes(self, seconds: float) -> bool:
        """Let the time pass; False: a failure came before, and the clock stands there."""
        if self.clock + seconds < self.next_failure:
            self.clock += seconds
            return True
        self.clock = self.next_failure
        self.next_failure += self._until_failure()
        self.failures += 1
        return False

    def _resume(self) -> int:
        """The step to go on from, as in training/resume.py: no finished checkpoint may be lost."""
        for damaged in incomplete_checkpoints(self.run_dir):
            shutil.rmtree(set_aside(damaged))
        found = complete_checkpoints(self.run_dir)
        assert [step_of(path) for path in found] == self.finished[: -KEPT - 1 : -1]
        if not found:
            return 0
        verify(found[0])
        return step_of(found[0])

    def _train(self, step: int, end: float) -> None:
        """Until the next failure, or the end."""
        written: int | None = None  # the step that is being saved in the background
        while self.clock < end:
            interval = self.interval
            if written is not None:
                if not self._passes(self.save.background):
                    return self._tear(written)
                self._commit(written)
                interval, written = max(0.0, interval - self.save.background), None
            if not self._passes(interval):
                return None
            step += self.every
            if not self._passes(self.save.blocked):
                return self._tear(step)
            if self.save.background:
                written = step
            else:
                self._commit(step)
        if written is not None:
            self._commit(written)
        return None

    def _partial(self, step: int) -> Path:
        partial = checkpoint_path(self.run_dir, step).with_name(f".step-{step:08d}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        (partial / SHARD).write_text(f"weights of step {step}")
        return partial

    def _complete(self, step: int) -> Path:
        """The steps of write_checkpoint (checkpoint/sharded.py): write, list, rename."""
        partial = self._partial(step)
        (partial / STATE).write_text(json.dumps({"step": step}))
        files = {name: entry_of(partial / name) for name in (SHARD, STATE)}
        (partial / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
        return partial.rename(checkpoint_path(self.run_dir, step))

    def _commit(self, step: int) -> None:
        self._complete(step)
        self.finished.append(step)
        delete(superseded(self.run_dir, KEPT))

    def _tear(self, step: int) -> None:
        """What a failure in a save leaves: a directory that is not renamed yet, one without its manifest, or
        one with a file that is too short, as after a loss of power."""
        match self.torn % 3:
            case 0:
                self._partial(step)
            case 1:
                self._partial(step).rename(checkpoint_path(self.run_dir, step))
            case 2:
                (self._complete(step) / SHARD).write_text("weights")
        self.torn += 1
