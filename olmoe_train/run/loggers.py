"""Where metrics go: metrics.jsonl and wandb."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import wandb

from olmoe_train.config.choices import WandbMode
from olmoe_train.config.train import WandbConfig
from olmoe_train.utils.redaction import redact_text

log = logging.getLogger("olmoe")


WANDB_START_S, WANDB_END_S = 30.0, 60.0
"""How long rank 0 waits for wandb as it starts, and as the run ends."""


def forget_after(path: Path, step: int) -> None:
    """Drop what a run logged between the checkpoint it resumes from and its end: those steps come again."""
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True) if step else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def start_wandb(cfg: WandbConfig, run_dir: Path, config: dict[str, Any]) -> Any:
    """A wandb run, or None where it is disabled or cannot start: observing never stops a run."""
    if cfg.mode is WandbMode.disabled:
        return None
    mode = cfg.mode.value
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        log.warning(
            "warning: logging.wandb.mode=online, but there is no API key: logging offline (wandb sync later)"
        )
        mode = "offline"
    try:
        return wandb.init(
            project=cfg.project,
            name=redact_text(cfg.name or run_dir.resolve().name),
            dir=str(run_dir),
            mode=mode,
            config=config,
            # x_disable_meta: it would take the command line, and the git remote's URL, as they are.
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=WANDB_START_S,
                finish_timeout=WANDB_END_S,
                finish_timeout_raises=True,
                x_disable_meta=True,
            ),
        )
    except Exception as error:
        log.warning("warning: wandb could not start (%s); metrics.jsonl has everything", error)
        return None
