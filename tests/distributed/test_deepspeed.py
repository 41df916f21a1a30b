"""DeepSpeed's checkpoints: the same as every other strategy's, exact, and for any layout. Its steps are
compared in test_equivalence.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.directory import latest_checkpoint
from olmoe_train.checkpoint.sharded import load_checkpoint
from olmoe_train.config.choices import Strategy
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.optim.build import build_optimizer
from olmoe_train.train import train
from olmoe_train.training.build import build_engine, build_model
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared
from tests.support.faults import metrics
from tests.support.ranks import run_ranks
from tests.support.runs import TINY, Layout, compose, real_tokens
from tests.support.tiny import whole_state

Steps = dict[int, tuple[float, float]]
"""Loss and gradient norm by step."""
ZERO = {stage: Layout(2, 4, "deepspeed", experts=2, zero_stage=stage) for stage in range(4)}
LAYOUTS = {f"zero-{stage}": layout for stage, layout in ZERO.items()} | {
    "zero-1, bf16": replace(ZERO[1], precision="bf16"),
    "zero-2, bf16, offloaded": replace(ZERO[2], precision="bf16", offload="optimizer", micro_batch=8),
    "zero-3, bf16, offloaded": replace(ZERO[3], precision="bf16", offload="parameters"),
}
# Each goes on from what the one before has saved.
CHAIN = [
    Layout(4, 4, "deepspeed", experts=4, zero_stage=3),
    Layout(2, 8, "fsdp"),
    Layout(2, 8, "deepspeed", zero_stage=2),
    Layout(1, 16, "deepspeed", zero_stage=3),
    Layout(4, 4, "deepspeed", experts=2, zero_stage=1),
    Layout(2, 8, "ddp", experts=2),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    directory = tmp_path_factory.mktemp("data")
    write_prepared(directory, real_tokens(), real_tokens()[:1], vocab_size=258)
    # An odd vocabulary: no cut of the embedding is even.
    return compose(TINY | {"data.dir": directory, "model.vocab_size": 321})


def stop_at(cfg: TrainConfig, step: int) -> TrainConfig:
    return replace(cfg, trainer=replace(cfg.trainer, stop_at_step=step))


def load(cfg: TrainConfig) -> tuple[Any, Any]:
    """The newest checkpoint of a run, in the model and optimizer that `train` loads it into."""
    model = build_model(cfg, build_mesh(cfg.parallel, init_distributed("cpu")))
    optimizer = build_optimizer(model.parameters(), cfg.optimizer)
    directory = latest_checkpoint(Path(cfg.run_dir))
    assert directory is not None
    load_checkpoint(directory, model, optimizer)
    return model, optimizer


def logged(run_dir: str) -> Steps:
    return {step["step"]: (step["train/loss"], step["train/grad_norm"]) for step in metrics(run_dir)}


# --- a run that was stopped -------------------------------------------------------------------------------


def train_twins(tiny: TrainConfig, directory: Path) -> dict[str, tuple[Any, Any]]:
    """By layout, (steps, final state) of a run without and of one with a stop in the middle."""
    found: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        whole = stop_at(layout.config(tiny, directory / name / "whole"), 4)
        halved = layout.config(tiny, directory / name / "halved")
        train(whole)
        train(stop_at(halved, 2))
        train(stop_at(halved, 4))
        found[name] = tuple((logged(c.run_dir), whole_state(*load(c))) for c in (whole, halved))
    return found


@pytest.fixture(scope="module")
def twins(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    return run_ranks(2, train_twins, tiny, tmp_path_factory.mktemp("twins"), timeout=600)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    twins: dict[str, tuple[Any, Any]], name: str
) -> None:
    (steps, state), (steps_halved, state_halved) = twins[name]
    assert list(steps) == list(steps_halved) == [1, 2, 3, 4]
    assert steps == steps_halved
    assert state.keys() == state_halved.keys()
    assert state["lm_head.weight/step"] == 4
    assert state["lm_head.weight/exp_avg"].abs().max() > 0
    for key, tensor in state.items():
        assert torch.equal(tensor, state_halved[key]), key


# --- other layouts ----------------------------------------------------------------------------------------


def one_step(cfg: TrainConfig, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train a step; then what was saved, and what an engine that starts from it would save."""
    train(stop_at(cfg, step))
    saved = whole_state(*load(cfg))
    if cfg.parallel.strategy is not Strategy.deepspeed:
        return saved, saved
    engine = build_engine(cfg, torch.device("cpu"))
    checkpoint = latest_checkpoint(Path(cfg.run_dir))
    assert checkpoint is not None
    engine.load(checkpoint)
    model, optimizer = engine.state()
    assert isinstance(model, OlmoeForCausalLM)
    assert isinstance(optimizer, torch.optim.AdamW)
    return saved, whole_state(model, optimizer)


def test_a_run_goes_on_in_any_layout(tiny: TrainConfig, tmp_path: Path) -> None:
    for step, layout in enumerate(CHAIN, start=1):
        cfg = layout.config(tiny, tmp_path / "chain")
        saved, saved_again = run_ranks(layout.ranks, one_step, cfg, step, timeout=240)[0]
        assert saved.keys() == saved_again.keys()
        for key, tensor in saved.items():
            assert torch.equal(tensor, saved_again[key]), (layout, key)
    alone = Layout(1, 16).config(tiny, tmp_path / "alone")
    expected, _ = run_ranks(1, one_step, alone, len(CHAIN))[0]
    for key, tensor in expected.items():
        assert (saved[key] - tensor).norm() <= 1e-5 * tensor.norm(), key
    steps, steps_alone = logged(cfg.run_dir), logged(alone.run_dir)
    assert steps.keys() == steps_alone.keys()
    for step, (loss, norm) in steps_alone.items():
        assert steps[step][0] == pytest.approx(loss, rel=2e-5)
        assert steps[step][1] == pytest.approx(norm, rel=1e-4)


# --- a user's own JSON ------------------------------------------------------------------------------------


def read_user_file(tiny: TrainConfig, directory: Path) -> None:
    file = directory / "mine.json"
    cfg = ZERO[2].config(tiny, directory / "run")
    cfg = replace(cfg, parallel=replace(cfg.parallel, deepspeed_config=str(file)))
    if dist.get_rank() == 0:
        file.write_text('{"zero_optimization": {"reduce_bucket_size": "many"}}')
    dist.barrier()
    with pytest.raises(UserError, match="DeepSpeed does not take it") as caught:
        validate(cfg, dist.get_world_size())
    assert "reduce_bucket_size" in str(caught.value)
    dist.barrier()
    if dist.get_rank() == 0:
        file.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}, "train_batch_size": "auto"}')
    dist.barrier()
    train(stop_at(cfg, 1))


def test_a_users_json_is_merged_and_read_before_anything_is_built(tiny: TrainConfig, tmp_path: Path) -> None:
    run_ranks(2, read_user_file, tiny, tmp_path)
    used = json.loads((tmp_path / "run" / "deepspeed.json").read_text())
    assert used["zero_optimization"]["reduce_bucket_size"] == 1000
    assert used["zero_optimization"]["stage"] == 2
    assert used["train_batch_size"] == 16
