"""kill -9 of a rank of a DeepSpeed run, and the same again: bit for bit the run that was not killed."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.train import TrainConfig
from olmoe_train.train import train
from tests.support.data import write_prepared
from tests.support.faults import metrics, same, saved_weights
from tests.support.ranks import RankError, run_ranks
from tests.support.runs import TINY, Layout, compose, real_tokens

STEPS = 12


def die_once_there_is(checkpoint: Path) -> None:
    while not checkpoint.exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def run(cfg: TrainConfig, kill_after: int | None = None) -> dict[str, Tensor]:
    """Train to the end; final weights. kill_after: rank 1 dies as the checkpoint of that step appears."""
    if kill_after is not None and dist.get_rank() == 1:
        checkpoint = Path(cfg.run_dir) / "checkpoints" / f"step-{kill_after:08d}"
        threading.Thread(target=die_once_there_is, args=(checkpoint,), daemon=True).start()
    train(cfg)
    return saved_weights(cfg.run_dir)


def losses(run_dir: str) -> dict[int, tuple[float, float]]:
    """Loss and norm by step; of a step that was trained twice, the second time's."""
    return {step["step"]: (step["train/loss"], step["train/grad_norm"]) for step in metrics(run_dir)}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_killed_run_goes_on_exactly(tmp_path: Path, stage: int) -> None:
    write_prepared(tmp_path / "data", real_tokens(), real_tokens()[:1], vocab_size=258)
    tiny = compose(TINY | {"data.dir": tmp_path / "data", "trainer.max_steps": STEPS})
    layout = Layout(2, 8, "deepspeed", experts=2, zero_stage=stage)
    cfg = layout.config(tiny, tmp_path / "killed")
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, every=2))
    with pytest.raises(RankError, match="rank 1: died without a word, exit code -9"):
        run_ranks(2, run, cfg, 4)
    stopped = max(losses(cfg.run_dir))
    assert 4 <= stopped < STEPS
    resumed = run_ranks(2, run, cfg)[0]
    twin = replace(cfg, run_dir=str(tmp_path / "twin"))
    expected = run_ranks(2, run, twin)[0]
    assert losses(cfg.run_dir) == losses(twin.run_dir)
    assert same(resumed, expected)
