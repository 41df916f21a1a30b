"""Numbers that go wrong in a run: skipped by all ranks together, within a budget, and never saved."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from olmoe_train.config.choices import Precision, Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.training.callbacks.base import Callback
from olmoe_train.training.engine.base import Engine
from tests.support.faults import (
    at_step,
    change_engine,
    config,
    metrics,
    run,
    same,
    saved_steps,
    saved_tensors,
    spoil_activations,
    status,
)
from tests.support.ranks import RankError, run_ranks


def test_nan_on_one_rank_is_skipped_by_all_and_endless_nan_ends_the_run(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, trainer={"max_steps": 12, "max_skipped_steps": 2})
    once = partial(spoil_activations, 1, range(3, 4), math.nan)
    always = partial(spoil_activations, 0, range(6, 99), math.nan)
    with pytest.raises(RankError, match=r"3 of the last 7 updates were skipped.*max_skipped_steps=2"):
        run_ranks(2, run, cfg, once, always)

    states = {step: saved_tensors(tmp_path, step) for step in saved_steps(tmp_path)}
    assert list(states) == [1, 2, 3, 4, 5, 6]  # the third skipped step, 7, is not saved
    assert same(states[2], states[3])
    assert same(states[5], states[6])
    assert not same(states[3], states[4])  # the next step counts again
    assert all(tensor.isfinite().all() for state in states.values() for tensor in state.values())
    assert [record["train/skipped_steps"] for record in metrics(tmp_path)] == [0, 0, 1, 1, 1, 2, 3]
    lost = [record["step"] for record in metrics(tmp_path) if record["train/grad_norm"] is None]
    assert lost == [3, 6, 7]
    said = (tmp_path / "log.txt").read_text()
    assert "1 updates skipped, lately at 3: gradient or loss is not finite" in said
    assert status(tmp_path)["state"] == "failed"
    assert "trainer.max_skipped_steps" in status(tmp_path)["reason"]


def test_endless_nan_is_found_before_a_save_that_nothing_was_logged_before(
    data: Path, tmp_path: Path
) -> None:
    trainer = {"max_steps": 12, "max_skipped_steps": 2, "log_every": 100}
    cfg = config(data, tmp_path, trainer=trainer, checkpoint={"every": 4})
    with pytest.raises(RankError, match=r"3 of the last 4 updates were skipped"):
        run_ranks(2, run, cfg, partial(spoil_activations, 0, range(2, 99), math.nan))
    assert saved_steps(tmp_path) == []


def spoil_a_weight(rank: int, step: int) -> Callback:
    engines: list[Engine] = []
    change_engine(engines.append)

    def spoil() -> None:
        local_tensor(engines[0].model.lm_head.weight.detach())[0].fill_(math.nan)

    return at_step(rank, step, spoil)


def test_weights_that_are_not_finite_are_not_saved(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="not saved: parameters or moments on rank 1 are not finite"):
        run_ranks(2, run, config(data, tmp_path), partial(spoil_a_weight, 1, 3))
    assert saved_steps(tmp_path) == [1, 2]
    assert "not saved" in status(tmp_path)["reason"]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, Precision.fp32), (1, Precision.bf16), (2, Precision.fp32), (3, Precision.fp32), (3, Precision.bf16)],
)
def test_nan_with_deepspeed(data: Path, tmp_path: Path, stage: int, precision: Precision) -> None:
    # In the gradients alone: the loss does not tell.
    once = partial(spoil_activations, 1, range(2, 3), math.nan, gradients=True)
    cfg = config(data, tmp_path, trainer={"max_steps": 3, "precision": precision})
    parallel = ParallelConfig(strategy=Strategy.deepspeed, zero_stage=stage, expert_parallel_size=2)
    run_ranks(2, run, replace(cfg, parallel=parallel), once)
    states = [saved_tensors(tmp_path, step) for step in (1, 2, 3)]
    assert same(states[0], states[1])
    assert not same(states[1], states[2])
    assert all(tensor.isfinite().all() for tensor in states[2].values())
    assert [record["train/skipped_steps"] for record in metrics(tmp_path)] == [0, 1, 1]
    assert [record["step"] for record in metrics(tmp_path) if record["train/grad_norm"] is None] == [2]
    explained = json.loads((tmp_path / "spikes/step-00000002.json").read_text())
    shares = [document["loss_share"] for document in explained["documents"]]
    tolerance = 1e-5 if precision is Precision.fp32 else 1e-2
    assert sum(shares) == pytest.approx(metrics(tmp_path)[1]["train/ce_loss"], abs=tolerance)


def test_a_spike_is_skipped_after_a_resume_too(data: Path, tmp_path: Path) -> None:
    # 35 steps are enough to know a spike by; a run that forgot them would not.
    trainer = {"max_steps": 37, "spike_sigmas": 8.0}
    until = trainer | {"stop_at_step": 35, "log_every": 5}
    first = config(data, tmp_path, trainer=until, checkpoint={"every": 0})
    run_ranks(2, run, first)
    spike = partial(spoil_activations, 1, range(36, 37), 1e4)
    run_ranks(2, run, config(data, tmp_path, trainer=trainer), spike)
    assert metrics(tmp_path)[-1]["train/skipped_steps"] == 1
    assert same(saved_tensors(tmp_path, 35), saved_tensors(tmp_path, 36))
    assert not same(saved_tensors(tmp_path, 36), saved_tensors(tmp_path, 37))
    assert "lately at 36: loss or gradient norm is a spike" in (tmp_path / "log.txt").read_text()
