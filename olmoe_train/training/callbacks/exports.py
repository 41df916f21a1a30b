"""Exports checkpoints to run_dir/hf as Hugging Face directories, every checkpoint.export_every steps."""

import logging
from pathlib import Path

from olmoe_train.checkpoint.convert.export import export_checkpoint, hf_directory
from olmoe_train.checkpoint.directory import step_of
from olmoe_train.training.callbacks.base import Callback

log = logging.getLogger(__name__)


class Exports(Callback):
    def __init__(self, run_dir: Path, every: int) -> None:
        """every: steps between exports; 0: none."""
        self.run_dir, self.every = run_dir, every

    def on_save(self, checkpoint: Path) -> None:
        if not self.every or step_of(checkpoint) % self.every:
            return
        try:
            out = hf_directory(self.run_dir, checkpoint)
            export_checkpoint(self.run_dir, checkpoint, out)
            log.info("exported to %s", out)
        except Exception as error:  # the checkpoint is there, and can be exported at any time
            log.warning("WARNING: exporting %s failed: %s", checkpoint, error)
