"""A decay that branches from a stable checkpoint of another run is that of the run that had it planned."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from olmoe_train.checkpoint.branch import checkpoint_before
from olmoe_train.checkpoint.directory import checkpoint_path, entry_of
from olmoe_train.checkpoint.sharded import saved_state
from olmoe_train.config.choices import DecayShape, Schedule
from olmoe_train.config.train import CheckpointConfig, ParallelConfig, SchedulerConfig, TrainConfig
from olmoe_train.train import train
from olmoe_train.training.compatibility import check_changes
from olmoe_train.training.preflight.branch import branch_errors, branch_warnings
from olmoe_train.utils.errors import UserError
from tests.support.faults import assert_same_end, at_step, config, metrics, records, run, status, write_data
from tests.support.ranks import run_ranks

WSD = SchedulerConfig(kind=Schedule.wsd, decay_length_steps=3, decay_shape=DecayShape.sqrt, final_factor=0.0)
RunConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The configuration of a run of six steps on one rank, with dropout and wsd: partial of `config`."""
    data = write_data(tmp_path_factory.mktemp("data") / "prepared")
    changes: dict[str, Any] = {"parallel": ParallelConfig(), "scheduler": WSD}
    return partial(config, data, model={"attention_dropout": 0.3}, **changes)


@pytest.fixture(scope="module")
def stable(one_rank: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that is stable up to its step 5, where it was stopped. Its decay is far away."""
    run_dir = tmp_path_factory.mktemp("runs") / "stable"
    train(one_rank(run_dir, trainer={"max_steps": 20, "stop_at_step": 5}, evaluation={"every": 3}))
    dist.destroy_process_group()
    return run_dir


@pytest.fixture(scope="module")
def direct(one_rank: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose decay over the steps 4 to 6 was planned from the start."""
    run_dir = tmp_path_factory.mktemp("runs") / "direct"
    train(one_rank(run_dir, evaluation={"every": 3}))
    dist.destroy_process_group()
    return run_dir


def files_of(run_dir: Path) -> dict[str, Any]:
    """Size and hash of every file of a run."""
    return {str(path): entry_of(path) for path in sorted(run_dir.rglob("*")) if path.is_file()}


def branch(stable: Path, step: int = 3, **changes: Any) -> CheckpointConfig:
    return replace(CheckpointConfig(every=1, keep=0, branch_from=f"{stable}@{step}"), **changes)


def die() -> None:
    raise RuntimeError("injected")


def test_a_branched_decay_is_the_planned_one(
    one_rank: RunConfig, stable: Path, direct: Path, tmp_path: Path
) -> None:
    parent, run_dir = tmp_path / "parent", tmp_path / "decay"
    shutil.copytree(stable, parent)
    before = files_of(parent)
    cfg = one_rank(run_dir, checkpoint=branch(parent), evaluation={"every": 3})
    unsaved = replace(cfg, checkpoint=branch(parent, every=0))
    with pytest.raises(RuntimeError, match="injected"):  # it branches, and dies before its first save
        train(unsaved, callbacks=(at_step(0, 6, die),))
    assert [record["step"] for record in metrics(run_dir)] == [1, 2, 3, 4, 5]
    train(replace(cfg, trainer=replace(cfg.trainer, stop_at_step=4)))  # it branches again, and stops
    assert files_of(parent) == before
    parent.rename(tmp_path / "gone")
    train(cfg)  # from its own checkpoint

    assert_same_end(run_dir, direct)
    rates = [record["train/lr"] for record in metrics(run_dir)]
    # 1 - sqrt(1/3) and 1 - sqrt(2/3) of the peak of 0.01, then 0.
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 4.226497e-3, 1.835034e-3, 0.0])
    name = "eval/validation/loss"
    assert [r[name] for r in records(run_dir, name)] == [r[name] for r in records(direct, name)]
    origin = json.loads((run_dir / "branch.json").read_text())
    assert origin == {"branch_from": f"{parent}@3", "step": 3}
    log = (run_dir / "log.txt").read_text()
    assert log.count(f"branched from {checkpoint_path(parent, 3)}") == 2
    assert "max_steps: 20 in the checkpoint, 6 now" in log
    assert f"resumed from {checkpoint_path(run_dir, 4)}" in log
    # Each start is one more, and what a start logged that died is not forgotten.
    assert [record["resumes"] for record in metrics(run_dir)] == [0, 0, 0, 2, 3, 3]


@pytest.mark.ranks
def test_a_branch_on_two_ranks(one_rank: RunConfig, stable: Path, tmp_path: Path) -> None:
    # What is dropped depends on the rank, so both branches drop nothing.
    changes: dict[str, Any] = {
        "model": {"attention_dropout": 0.0},
        "parallel": ParallelConfig(expert_parallel_size=2),
        "checkpoint": branch(stable, allow_changes=["model.attention_dropout"]),
    }
    two, one = (one_rank(tmp_path / name, **changes) for name in ("two", "one"))
    run_ranks(2, run, two)
    train(replace(one, parallel=ParallelConfig()))
    assert status(tmp_path / "two")["state"] == "done"
    for mine, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert (mine["step"], mine["tokens"]) == (expected["step"], expected["tokens"])
        assert mine["train/loss"] == pytest.approx(expected["train/loss"], rel=2e-5)
        assert mine["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)


def test_mistakes_of_a_branch_are_told_before_it_starts(
    one_rank: RunConfig, stable: Path, direct: Path, tmp_path: Path
) -> None:
    def errors(checkpoint: CheckpointConfig, run_dir: Path = tmp_path / "new", steps: int = 9) -> str:
        return "\n".join(
            branch_errors(one_rank(run_dir, checkpoint=checkpoint, trainer={"max_steps": steps}))
        )

    assert errors(branch(stable)) == ""
    assert "@9: " in (told := errors(branch(stable, step=9)))
    assert f"not a complete checkpoint; the complete steps of {stable} are 1, 2, 3, 4, 5" in told
    assert "there is no run directory nowhere; give RUN_DIR@STEP" in errors(branch(Path("nowhere")))
    assert "begins after step 5, and the run ends at step 4; raise" in errors(branch(stable, 5), steps=4)
    assert "both name a checkpoint" in errors(branch(stable, resume=str(checkpoint_path(stable, 3))))
    assert f"run_dir={stable} is the parent" in errors(branch(stable), stable)
    assert f"run_dir={direct} already holds another run" in errors(branch(stable), direct)

    other = tmp_path / "other"
    other.mkdir()
    (other / "branch.json").write_text(json.dumps({"branch_from": f"{stable}@2", "step": 2}))
    assert f"already holds the branch with checkpoint.branch_from={stable}@2; give" in errors(
        branch(stable), other
    )
    with pytest.raises(UserError, match="already holds another run"):
        train(one_rank(direct, checkpoint=branch(stable)))


def test_a_branch_within_a_warmup_or_a_decay_warns(
    one_rank: RunConfig, stable: Path, direct: Path, tmp_path: Path
) -> None:
    def warnings(checkpoint: CheckpointConfig, steps: int, **scheduler: Any) -> list[str]:
        changes = {"trainer": {"max_steps": steps}, "scheduler": replace(WSD, **scheduler)}
        return branch_warnings(one_rank(tmp_path / "new", checkpoint=checkpoint, **changes))

    assert warnings(branch(direct, 3), 9) == []  # step 3 is the last one at the peak
    (told,) = warnings(branch(direct, 4), 9)
    assert "the parent is in its decay at step 4; that begins after step 3" in told
    (told,) = warnings(branch(stable, 5), 7)
    assert "from step 4 to 7, begins before step 5" in told
    assert "set scheduler.decay_length_steps to at most 2" in told
    (told,) = warnings(branch(stable, 5), 20, warmup_fraction=0.3)
    assert "the warm-up of this run ends at step 6, after step 5" in told


def test_a_step_of_a_branch_is_explained_with_the_parents_weights(stable: Path, tmp_path: Path) -> None:
    (tmp_path / "branch.json").write_text(json.dumps({"branch_from": f"{stable}@3", "step": 3}))
    assert checkpoint_before(tmp_path, 5) == checkpoint_path(stable, 3)
    with pytest.raises(UserError, match=f"step=3: .* ask for a step up to there from {stable}"):
        checkpoint_before(tmp_path, 3)
    assert checkpoint_before(stable, 1) is None


def test_a_checkpoint_of_before_wsd_resumes_and_other_decays_are_refused(direct: Path) -> None:
    now = saved_state(checkpoint_path(direct, 6))
    before = json.loads(json.dumps(now))
    before["config"]["scheduler"] = {"kind": "constant", "final_factor": 0.1}
    before["schedule"] = {"step at which the warm-up ends": 0.0}
    as_now = json.loads(json.dumps(before))
    as_now["config"]["scheduler"] |= {"decay_shape": "linear", "decay_fraction": None}
    check_changes(before, as_now, [], direct)
    other = json.loads(json.dumps(now))
    other["config"]["scheduler"]["decay_shape"] = "linear"
    other["schedule"]["shape of the decay"] = "linear"
    with pytest.raises(UserError, match=r"scheduler \(shape of the decay\): sqrt in the checkpoint, linear"):
        check_changes(now, other, [], direct)
