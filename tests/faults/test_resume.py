"""Runs that were killed, damaged or changed, and what the next start makes of them."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olmoe_train import train as train_module
from olmoe_train.checkpoint.directory import checkpoint_path
from olmoe_train.config.choices import Schedule
from olmoe_train.config.train import TrainConfig
from olmoe_train.train import train
from olmoe_train.utils.errors import UserError
from tests.support.faults import (
    assert_same_end,
    at_step,
    config,
    metrics,
    run,
    saved_steps,
    status,
    write_data,
)
from tests.support.ranks import RankError, run_ranks


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def set_clock(seconds: float) -> None:
    """From now on this process has another time of day."""
    real = time.time
    time.time = lambda: real() + seconds


@pytest.mark.parametrize("rank", [0, 1])
def test_kill_9_at_a_random_step(data: Path, twin: Path, tmp_path: Path, rank: int) -> None:
    step = random.randint(2, 6)  # nothing may depend on which
    cfg = config(data, tmp_path)
    with pytest.raises(RankError, match=rf"rank {rank}: died without a word, exit code -9"):
        run_ranks(2, run, cfg, partial(at_step, rank, step, kill))
    assert saved_steps(tmp_path) == list(range(1, step))
    assert status(tmp_path)["state"] == "failed"
    assert re.search(rf"rank {rank} \(host .*, process \d+\) died", status(tmp_path)["reason"])
    # Whoever goes on finds the clock an hour behind the one that the files were written by.
    assert run_ranks(2, run, cfg, partial(set_clock, -3600)) == [0, 0]
    assert_same_end(tmp_path, twin)
    log = (tmp_path / "log.txt").read_text()
    assert f"resumed from {checkpoint_path(tmp_path, step - 1)}" in log
    assert "did not end in order; it is continued" in log  # and its lock is nobody's


def jump(seconds: float) -> None:
    set_clock(seconds)
    time.sleep(1.1)  # two looks of the watchdog


def test_a_clock_that_jumps_is_not_noticed(data: Path, twin: Path, tmp_path: Path) -> None:
    forth, back = partial(at_step, 0, 3, partial(jump, 3600)), partial(at_step, 1, 5, partial(jump, -7200))
    assert run_ranks(2, run, config(data, tmp_path, trainer={"timeout": 60}), forth, back) == [0, 0]
    assert_same_end(tmp_path, twin)
    # 64 tokens in an hour would be 0.02 a second.
    assert all(1 < record["perf/tokens_per_second"] < 1e6 for record in metrics(tmp_path))


def test_generators_and_what_the_router_remembers_go_on(data: Path, twin: Path, tmp_path: Path) -> None:
    # With dropout a step takes random numbers, on each rank others; most experts get no token in most steps.
    model = {"attention_dropout": 0.3, "num_experts": 32, "num_experts_per_tok": 1}
    changes = {"model": model, "logging": {"dead_expert_steps": 2}, "checkpoint": {"every": 0}}
    changes["scheduler"] = {"kind": Schedule.cosine, "warmup_steps": 2}
    run_ranks(2, run, config(data, tmp_path / "whole", **changes))
    for end in (3, 6):
        run_ranks(2, run, config(data, tmp_path / "parts", trainer={"stop_at_step": end}, **changes))
    assert_same_end(tmp_path / "parts", tmp_path / "whole")
    fourth = metrics(tmp_path / "parts")[3]
    unused = sum(not load for layer in (0, 1) for load in fourth[f"router/layer_{layer:02d}/load"])
    assert 0 < fourth["router/dead_experts"] < unused  # of some it is known that step 3 used them


def draw(seed: int, step: int) -> list[float]:
    train_module.seed_dropout(seed, step)
    return torch.rand(4).tolist()


def test_every_rank_and_step_has_random_numbers_of_its_own() -> None:
    (zero, one), (again, _), (later, _) = (run_ranks(2, draw, 0, step) for step in (5, 5, 6))
    assert zero == again
    assert len({tuple(numbers) for numbers in (zero, one, later)}) == 3


# --- damage -------------------------------------------------------------------------------------------------


def flip_a_bit(checkpoint: Path) -> None:
    shard = max(checkpoint.glob("shard-00002-*"))
    content = bytearray(shard.read_bytes())
    content[-7] ^= 16
    shard.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    shard = max(checkpoint.glob("shard-00001-*"))
    os.truncate(shard, shard.stat().st_size // 2)


def lose_a_ranks_file(checkpoint: Path) -> None:
    max(checkpoint.glob("shard-00002-*")).unlink()


def tear_the_marker(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-30])


DAMAGES = (flip_a_bit, truncate, lose_a_ranks_file, tear_the_marker)


def resume_all(cfg: TrainConfig, run_dirs: list[Path]) -> None:
    damaged = str(checkpoint_path(run_dirs[0], 6))
    asked_for = replace(cfg, run_dir=str(run_dirs[0]), checkpoint=replace(cfg.checkpoint, resume=damaged))
    with pytest.raises(UserError, match=f"checkpoint.resume={damaged}: .* is damaged.*; give another"):
        train(asked_for)
    for run_dir in run_dirs:
        assert train(replace(cfg, run_dir=str(run_dir))).step == 6


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    data: Path, twin: Path, tmp_path: Path
) -> None:
    run_dirs = []
    for damage in DAMAGES:
        run_dirs.append(tmp_path / damage.__name__)
        shutil.copytree(twin, run_dirs[-1])
        damage(checkpoint_path(run_dirs[-1], 6))
    run_ranks(2, resume_all, config(data, tmp_path), run_dirs)
    for run_dir in run_dirs:
        assert_same_end(run_dir, twin)
        log = (run_dir / "log.txt").read_text()
        assert f"resumed from {checkpoint_path(run_dir, 5)}" in log
        assert "set aside" in log
        assert (run_dir / "checkpoints" / "step-00000006.damaged").is_dir()


# --- changes ------------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "model.intermediate_size": {"model": {"intermediate_size": 8}},
    "data.sequence_length": {"data": {"sequence_length": 8}},
    "trainer.global_batch_size": {"trainer": {"global_batch_size": 8}},
    "optimizer.lr": {"optimizer": {"lr": 2e-2}},
    "loss.router_z_loss_coef": {"loss": {"router_z_loss_coef": 0.0}},
    "scheduler (step at which the warm-up ends)": {"scheduler": {"warmup_steps": 5}},
}
HARMLESS = {
    "data": {"num_workers": 1},
    "trainer": {"log_every": 2, "timeout": 100.0, "max_steps": 7, "stop_at_step": 6},  # a constant rate
    "checkpoint": {"keep": 3, "every": 2},
}


def allow_children() -> None:
    """The ranks of these tests are daemons, which may not start a loader's workers."""
    multiprocessing.current_process()._config["daemon"] = False


def refusals(cfgs: list[TrainConfig]) -> list[str]:
    said = []
    for cfg in cfgs:
        with pytest.raises(UserError) as caught:
            train(cfg)
        dist.barrier()
        said.append(str(caught.value))
    return said


def test_changes_of_the_mathematics_are_refused_and_others_logged(
    data: Path, twin: Path, tmp_path: Path
) -> None:
    shutil.copytree(twin, tmp_path / "run")
    for step in (4, 5, 6):
        shutil.rmtree(checkpoint_path(tmp_path / "run", step))
    changed = [config(data, tmp_path / "run", **changes) for changes in REFUSED.values()]
    # As many tokens as before, and one of them another.
    other = write_data(tmp_path / "other", first=3)
    changed.append(config(other, tmp_path / "run"))
    keys = [*REFUSED, "data (train_sha256)"]
    for key, message in zip(keys, run_ranks(2, refusals, changed)[0], strict=True):
        allow = key.split(" ")[0]
        assert f"\n  {key}: " in message
        assert " in the checkpoint, " in message
        assert f"checkpoint.allow_changes=[{allow}]" in message
        assert len(message.splitlines()) == 3, message

    assert run_ranks(2, run, config(data, tmp_path / "run", **HARMLESS), allow_children) == [0, 0]
    log = (tmp_path / "run" / "log.txt").read_text()
    for change in (
        "data.num_workers: 0 in the checkpoint, 1 now",
        "trainer.max_steps: 6 in the checkpoint, 7",
    ):
        assert f"changed since the checkpoint: {change}" in log
    expected = {record["step"]: record["train/loss"] for record in metrics(twin)}
    assert [record["train/loss"] for record in metrics(tmp_path / "run")[-2:]] == [expected[4], expected[6]]


def test_a_change_that_is_allowed_goes_on(data: Path, twin: Path, tmp_path: Path) -> None:
    shutil.copytree(twin, tmp_path / "run")
    cfg = config(
        data,
        tmp_path / "run",
        optimizer={"lr": 2e-2},
        trainer={"max_steps": 7},
        checkpoint={"allow_changes": ["optimizer.lr"]},
    )
    assert run_ranks(2, run, cfg) == [0, 0]
    assert metrics(tmp_path / "run")[-1]["train/lr"] == 2e-2
    assert "and allowed to: optimizer.lr: 0.01 in" in (tmp_path / "run" / "log.txt").read_text()


def test_other_ranks_and_layouts_take_over(data: Path, twin: Path, tmp_path: Path) -> None:
    def part(ranks: int, experts: int, end: int) -> dict[str, Any]:
        trainer = {"micro_batch_size": 4 // ranks, "stop_at_step": end}
        cfg = config(data, tmp_path, trainer=trainer, checkpoint={"every": 0})
        run_ranks(ranks, run, replace(cfg, parallel=replace(cfg.parallel, expert_parallel_size=experts)))
        return status(tmp_path)

    assert part(4, 4, 2)["state"] == "stopped"
    assert part(2, 1, 3)["state"] == "stopped"
    assert part(1, 1, 4)["state"] == "stopped"
    assert part(4, 2, 6)["state"] == "done"
    for mine, expected in zip(metrics(tmp_path), metrics(twin), strict=True):
        assert mine["tokens"] == expected["tokens"]
        assert mine["train/loss"] == pytest.approx(expected["train/loss"], rel=2e-5)
    state = json.loads((checkpoint_path(tmp_path, 6) / "state.json").read_text())["state"]
    assert (state["samples"], state["guard"]["skipped"]) == (24, 0)
