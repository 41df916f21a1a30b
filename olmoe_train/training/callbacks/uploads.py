"""Uploads checkpoints to checkpoint.upload_to, in a thread of rank 0, while training continues.

The run directory is shared by all ranks, so rank 0 sees every file. An upload that fails never stops a run:
the next checkpoint is tried. While one checkpoint is uploaded, only the newest of the others waits.
"""

import logging
import os
import shutil
import threading
import time
from pathlib import Path

import torch.distributed as dist

from olmoe_train.checkpoint.convert.export import hf_directory
from olmoe_train.checkpoint.directory import latest_checkpoint
from olmoe_train.checkpoint.remote import retire, upload_checkpoint, upload_directory, upload_run_files
from olmoe_train.config.train import CheckpointConfig
from olmoe_train.distributed.rendezvous import place_of
from olmoe_train.run.directory import Run
from olmoe_train.run.loggers import MetricsLog
from olmoe_train.training.callbacks.base import Callback
from olmoe_train.training.state import TrainState
from olmoe_train.utils.object_store import join, list_files
from olmoe_train.utils.redaction import redact_text

log = logging.getLogger(__name__)
STAGING = "uploading"
"""Directory of the run with hard links to the files of checkpoints that wait, as retention may delete the
checkpoints meanwhile."""
_POLL_S = 0.2


class Uploads(Callback):
    def __init__(self, cfg: CheckpointConfig, run: Run, metrics: MetricsLog) -> None:
        assert cfg.upload_to is not None
        self.cfg, self.run, self.metrics, self.url = cfg, run, metrics, cfg.upload_to
        self.failure: str | None = None
        """What the last upload failed with. None: it succeeded, or there was none."""
        self._waiting: Path | None = None
        """Links of the newest checkpoint that is not uploaded yet."""
        self._current: Path | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def on_start(self, state: TrainState) -> None:
        """Upload the newest checkpoint, which an earlier process may not have finished."""
        if dist.get_rank() != 0:
            return
        shutil.rmtree(self.run.path / STAGING, ignore_errors=True)
        newest = latest_checkpoint(self.run.path)
        if newest is not None:
            self.on_save(newest)

    def on_save(self, checkpoint: Path) -> None:
        links = _link(checkpoint, self.run.path / STAGING / checkpoint.name)
        with self._changed:
            skipped, self._waiting = self._waiting, links
            if self._thread is None:
                # A daemon: a run that fails does not wait for it; its next start uploads again.
                self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if skipped is not None and skipped != links:
            log.warning(
                "WARNING: %s is not uploaded, because uploads take longer than checkpoint.every=%d steps; "
                "next is %s",
                *(skipped.name, self.cfg.every, checkpoint.name),
            )
            _discard(skipped)

    def must_stop(self) -> bool:
        self._alert()
        return False

    def on_end(self, state: TrainState) -> None:
        """Wait for the uploads, at most checkpoint.upload_wait seconds."""
        if dist.get_rank() != 0:
            return
        until = time.monotonic() + self.cfg.upload_wait
        if self._busy:
            log.info(
                "waiting for the upload to %s, at most %g s", redact_text(self.url), self.cfg.upload_wait
            )
        while self._busy and time.monotonic() < until:
            self.run.watchdog.heartbeat("waiting for the upload of a checkpoint")
            time.sleep(_POLL_S)
        if self._busy:
            self.failure = (
                f"the upload to {redact_text(self.url)} was not finished within checkpoint.upload_wait="
                f"{self.cfg.upload_wait:g} s; the next start of the run uploads its newest checkpoint"
            )
            log.warning("WARNING: %s", self.failure)
        self._alert()

    @property
    def _busy(self) -> bool:
        with self._changed:
            return self._waiting is not None or self._current is not None

    def _alert(self) -> None:
        if self.failure is not None:
            self.metrics.alert("failed upload", f"uploading failed: {self.failure}")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._waiting is not None)
                self._current, self._waiting = self._waiting, None
            assert self._current is not None
            try:
                self._upload(self._current)
                self.failure = None
            except Exception as error:  # whatever it is, the checkpoint is on the disk, and training goes on
                self.failure = f"{place_of(0)}: {redact_text(str(error))}"
                log.warning(
                    "WARNING: uploading %s failed; training goes on: %s", self._current.name, self.failure
                )
            _discard(self._current)

    def _upload(self, links: Path) -> None:
        started = time.monotonic()
        upload_run_files(self.run.path, self.url)
        if upload_checkpoint(links, self.url):
            size = sum(path.stat().st_size for path in links.iterdir())
            where, seconds = redact_text(self.url), time.monotonic() - started
            log.info("uploaded %s to %s (%.1f MB in %.1f s)", links.name, where, size / 1e6, seconds)
        export = hf_directory(self.run.path, links)
        target = join(self.url, "hf", export.name)
        if export.is_dir() and "config.json" not in list_files(target):
            upload_directory(export, target, "config.json")
        retire(self.url, self.cfg.keep, self.cfg.keep_every)


def _link(checkpoint: Path, links: Path) -> Path:
    """Link the files of a checkpoint into another directory. Without links: return the checkpoint itself."""
    shutil.rmtree(links, ignore_errors=True)
    try:
        links.mkdir(parents=True)
        for path in checkpoint.iterdir():
            os.link(path, links / path.name)
    except OSError as error:
        log.warning("warning: %s cannot be linked (%s): it is uploaded from its place", checkpoint, error)
        shutil.rmtree(links, ignore_errors=True)
        return checkpoint
    return links


def _discard(links: Path) -> None:
    """Delete the links, not the checkpoint that stands in for them where links do not work."""
    if links.parent.name == STAGING:
        shutil.rmtree(links, ignore_errors=True)
