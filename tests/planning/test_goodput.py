"""Goodput and checkpoint intervals: by hand, and against simulated weeks with failures."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from olmoe_train.config.choices import Strategy
from olmoe_train.config.cluster import FailuresConfig
from olmoe_train.config.train import CheckpointConfig, ParallelConfig
from olmoe_train.planning.goodput import (
    Failures,
    Save,
    best_every,
    daly_interval,
    goodput,
    young_interval,
)
from olmoe_train.planning.goodput_report import checkpoint_bytes, goodput_lines, plan_failures, plan_save
from tests.support.plans import TOTAL, plan_config
from tests.support.simulated_run import SimulatedRun

WEEK = 7 * 86_400.0
HOURLY = Failures(mean_between=3600.0, restart=300.0)


def test_intervals_by_hand() -> None:
    """A save of 60 s and an MTBF of 7,200 s: sqrt(2 x 60 x 7200) = 929.516, and with x = 60 / 14,400 and
    sqrt(x) = 0.0645497, 929.516 x (1 + 0.0215166 + 0.0004630) - 60 = 889.946."""
    save, failures = Save(60.0), Failures(7200.0, 0.0)
    assert young_interval(save, failures) == pytest.approx(929.516, abs=1e-3)
    assert daly_interval(save, failures) == pytest.approx(889.946, abs=1e-3)
    assert daly_interval(Save(20_000.0), failures) == 7200.0  # longer than twice the MTBF
    assert best_every(10.0, save, failures) == 89
    assert best_every(5000.0, save, failures) == 1
    # A save in the background of 1,000 s: the next one would have to wait for it.
    assert best_every(10.0, Save(0.1, 1000.0), failures) == 100


def test_goodput_by_hand() -> None:
    """Without restarts, with t = d = M / 2 the run needs M (e - 1) seconds for M / 2 seconds of steps."""
    assert goodput(50.0, Save(50.0), Failures(100.0, 0.0)) == pytest.approx(0.5 / (math.e - 1))
    # In the background for M / 4, and with restarts of M / 4: sqrt(e) times as long.
    late = goodput(50.0, Save(50.0, 25.0), Failures(100.0, 25.0))
    assert late == pytest.approx(0.5 / (math.e - 1) / math.sqrt(math.e))
    # The save waits for the one before: 80 s pass for 50 s of steps.
    assert goodput(50.0, Save(20.0, 80.0), Failures(1e9, 0.0)) == pytest.approx(0.5, rel=1e-6)
    assert goodput(1e9, Save(1.0), Failures(1.0, 0.0)) == 0.0


@pytest.mark.parametrize("blocked", [1.0, 60.0, 600.0])
def test_dalys_interval_is_the_best(blocked: float) -> None:
    """Less than 0.1% of goodput is lost to that of the best of a thousand intervals."""
    save = Save(blocked)
    found = goodput(daly_interval(save, HOURLY), save, HOURLY)
    assert found >= 0.999 * max(goodput(10.0 * number, save, HOURLY) for number in range(1, 1000))


@pytest.mark.parametrize("save", [Save(60.0), Save(40.0, 300.0)], ids=["synchronous", "background"])
def test_simulated_weeks(save: Save, tmp_path: Path) -> None:
    """Three weeks with a failure per hour, some 500 of them: no finished checkpoint is lost (SimulatedRun),
    and the goodput, 0.73 to 0.76, is the predicted one to 5%.

    The time that a failure costs scatters about as much as its mean. The quarter of the time that 500 of them
    cost is known to 4.5%, and the goodput to 1.5%.
    """
    every = best_every(10.0, save, HOURLY)
    run = SimulatedRun(tmp_path, 10.0, every, save, HOURLY, seed=0)
    run.run_until(3 * WEEK)
    assert run.failures > 450
    assert run.torn > 20
    measured = 10.0 * run.finished[-1] / run.clock
    assert measured == pytest.approx(goodput(every * 10.0, save, HOURLY), rel=0.05)


def test_plan_of_failures_by_hand() -> None:
    """The published rate: 419 interruptions in 54 days are one in 3.09 hours, for 16,384 GPUs."""
    cfg = plan_config(gpus=64)
    assert plan_failures(cfg, 16_384).mean_between == pytest.approx(54 * 86_400 / 419, rel=1e-3)
    assert plan_failures(cfg, 8192).mean_between == pytest.approx(2 * 54 * 86_400 / 419, rel=1e-3)
    # fp32 weights and two moments, 10 GB/s: read once in a restart; written and read back in a save.
    assert checkpoint_bytes(cfg) == 12 * TOTAL
    assert plan_failures(cfg, 64).restart == pytest.approx(300 + 12 * TOTAL / 1e10)
    assert plan_save(cfg, 64, in_background=False).blocked == pytest.approx(24 * TOTAL / 1e10)
    # Each of 64 GPUs copies its part at 25 GB/s, and steps beside the save take a tenth longer; with 8 copies
    # of the model, the part is an eighth of it.
    copied = 12 * TOTAL / 25e9
    background = plan_save(cfg, 64, in_background=True)
    assert background.background == pytest.approx(24 * TOTAL / 1e10)
    assert background.blocked == pytest.approx(copied / 64 + 2.4 * TOTAL / 1e10)
    copies = replace(cfg, parallel=ParallelConfig(Strategy.fsdp, replicate_size=8))
    assert plan_save(copies, 64, True).blocked == pytest.approx(copied / 8 + 2.4 * TOTAL / 1e10)
    measured = replace(cfg, failures=FailuresConfig(save_seconds=40.0))
    assert plan_save(measured, 64, in_background=False) == Save(40.0)


def test_the_plan_names_checkpoint_every() -> None:
    cfg = plan_config(gpus=1024, failures=FailuresConfig(save_seconds=40.0))
    lines = goodput_lines(cfg)
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("  ")}
    assert list(rows) == ["GPUs", "64", "128", "256", "512", "1,024", "with"]
    seconds = 2.775 / 16  # of a step: 1024 x 4096 tokens at 23,604 tokens/s a GPU
    mean_between = 365.25 * 86_400 / (0.173 * 1024)
    by_young = math.sqrt(2 * 40 * mean_between) / seconds
    every = int(rows["1,024"][2].replace(",", ""))
    assert every == pytest.approx(by_young, rel=0.02)
    assert f"checkpoint.async_save=false: checkpoint.every={every}, goodput" in lines[-2]
    assert lines[-1].startswith("  with checkpoint.every=1000 it is ")
    # More GPUs fail more often, and saves in the background cost less.
    synchronous, background = (
        [float(rows[gpus][place].rstrip("%")) for gpus in ("64", "128", "256", "512", "1,024")]
        for place in (4, 8)
    )
    assert sorted(synchronous, reverse=True) == synchronous
    assert all(more > less for less, more in zip(synchronous, background, strict=True))

    never = goodput_lines(plan_config(checkpoint=CheckpointConfig(every=0)))
    assert "saves only at the end" in never[-1]
