"""RMSprop: its update by hand, its memory, and runs that stop and continue."""

from pathlib import Path

import pytest
import torch

from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.optimizer import RMSpropConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.optim.build import build_optimizer
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.memory import MicroBatch, rank_memory
from olmoe_train.training.preflight.parallel import parallel_errors
from tests.support.faults import config, run, same, saved_tensors, write_data
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES


def test_two_updates_by_hand() -> None:
    """lr 0.1, alpha 0.75, eps 0.5, L2 penalty 0.5; the gradient is 1.5, then 0.85."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    cfg = RMSpropConfig(lr=0.1, alpha=0.75, eps=0.5, weight_decay=0.5)
    optimizer = build_optimizer([weight], cfg)
    assert optimizer.param_groups[0]["initial_lr"] == 0.1
    # g = 1.5 + 0.5 x 1 = 2; mean square 0.25 x 4 = 1; update 0.1 x 2 / (1 + 0.5) = 2 / 15.
    weight.grad = torch.tensor([1.5])
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 2 / 15, abs=1e-7)
    # g = 0.85 + 0.5 x 13 / 15 = 77 / 60; mean square 0.75 + 0.25 x (77 / 60)^2 = 1.161736.
    weight.grad = torch.tensor([0.85])
    optimizer.step()
    assert weight.item() == pytest.approx(13 / 15 - 0.1 * (77 / 60) / (1.1617361**0.5 + 0.5), abs=1e-6)
    assert set(optimizer.state[weight]) == {"step", "square_avg"}


def test_values_out_of_range_are_named() -> None:
    assert RMSpropConfig().errors() == []
    assert RMSpropConfig(alpha=1.0, momentum=-0.1, eps=-1.0).errors() == [
        "optimizer.alpha=1.0: must be in [0, 1)",
        "optimizer.momentum=-0.1: must be in [0, 1)",
        "optimizer.eps=-1.0: must not be negative",
    ]


def test_deepspeed_refuses_it() -> None:
    cfg = TrainConfig(
        optimizer=RMSpropConfig(),
        parallel=ParallelConfig(strategy=Strategy.deepspeed),
        trainer=TrainerConfig(global_batch_size=8, micro_batch_size=8),
    )
    [error] = parallel_errors(cfg, world_size=1)
    assert error.startswith("optimizer=rmsprop: with parallel.strategy=deepspeed the optimizer is AdamW")


@pytest.mark.parametrize(("momentum", "moments"), [(0.0, 1), (0.9, 2)])
def test_a_plan_counts_its_moments(momentum: float, moments: int) -> None:
    cfg = RMSpropConfig(momentum=momentum)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([weight], cfg)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert sum(value.shape == weight.shape for value in optimizer.state[weight].values()) == moments
    batch = MicroBatch(1, 16, Precision.fp32, ActivationCheckpointing.none)
    layout = ParallelLayout(Strategy.fsdp, 1)
    memory = rank_memory(OlmoeConfig(**SIZES), layout, batch, optimizer=cfg)
    assert memory.optimizer == moments * memory.gradients


@pytest.mark.ranks
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_ranks_resume_bit_for_bit(tmp_path: Path, momentum: float) -> None:
    """FSDP2 with expert parallelism."""
    data = write_data(tmp_path / "data")
    optimizer = RMSpropConfig(lr=1e-3, momentum=momentum)
    for name, end in (("whole", 4), ("parts", 2), ("parts", 4)):
        trainer = {"max_steps": 4, "stop_at_step": end}
        run_ranks(2, run, config(data, tmp_path / name, optimizer=optimizer, trainer=trainer))
    whole, parts = (saved_tensors(tmp_path / name, 4) for name in ("whole", "parts"))
    assert any("square_avg" in name for name in whole)
    assert any("momentum_buffer" in name for name in whole) is (momentum > 0)
    assert same(whole, parts)
    assert not same(whole, saved_tensors(tmp_path / "whole", 3))
