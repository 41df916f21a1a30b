"""trainer.fused_backward: the same run bit for bit, without all gradients at once."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.optimizer import AdamWConfig, MuonConfig, OptimizerConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import parameter_groups
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.live_memory import LiveBytes
from olmoe_train.planning.memory import MicroBatch, rank_memory
from olmoe_train.train import train
from olmoe_train.training.engine.fsdp import FsdpEngine
from olmoe_train.training.preflight.fused_backward import fused_backward_errors
from tests.support.faults import config, metrics, saved_weights, write_data
from tests.support.tiny import LENGTH, SEQUENCES, build, global_batch

FP32_MOMENTS = AdamWConfig(lr=1e-2, max_grad_norm=0)
BF16_MOMENTS = AdamWConfig(lr=1e-2, max_grad_norm=0, moments_dtype=Precision.bf16)
LARGE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 6}


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def never(_norm: Tensor) -> Tensor:
    return torch.tensor(False)


def fused_engine(**sizes: Any) -> FsdpEngine:
    model, _ = build(**sizes)
    optimizer = build_optimizer(parameter_groups(model, BF16_MOMENTS), BF16_MOMENTS)
    return FsdpEngine(model, optimizer, 0.0, torch.device("cpu"), fused_backward=True)


def loss_of(model: OlmoeForCausalLM, sequences: int = SEQUENCES) -> Tensor:
    ids = global_batch(0)[:sequences]
    return model.training_forward(ids, ids).ce_sum / ids.numel()


@pytest.mark.parametrize("optimizer", [FP32_MOMENTS, BF16_MOMENTS])
def test_a_run_is_the_one_without_it(tmp_path: Path, optimizer: OptimizerConfig) -> None:
    data = write_data(tmp_path / "data")
    for fused in (False, True):
        changes = {"global_batch_size": 4, "micro_batch_size": 4, "fused_backward": fused, "max_steps": 4}
        alone = {"expert_parallel_size": 1}
        train(config(data, tmp_path / str(fused), trainer=changes, parallel=alone, optimizer=optimizer))
    apart, fused_run = (metrics(tmp_path / str(fused)) for fused in (False, True))
    assert [one["train/loss"] for one in fused_run] == [one["train/loss"] for one in apart]
    norms = [one["train/grad_norm"] for one in fused_run]
    assert norms == pytest.approx([one["train/grad_norm"] for one in apart], rel=1e-6)
    expected = saved_weights(tmp_path / "False")
    for name, weight in saved_weights(tmp_path / "True").items():
        assert torch.equal(weight, expected[name]), name


def test_gradients_that_are_not_finite_change_nothing() -> None:
    engine = fused_engine()
    before = [weight.detach().clone() for weight in engine.model.parameters()]
    engine.backward(loss_of(engine.model) * float("nan"), last=True)
    assert engine.step(lambda norm: ~norm.isfinite()).skipped
    assert all(map(torch.equal, engine.model.parameters(), before))
    engine.backward(loss_of(engine.model), last=True)
    assert engine.step(never).grad_norm > 0
    assert not any(map(torch.equal, engine.model.parameters(), before))


def test_another_backward_pass_updates_nothing() -> None:
    """Such as those that explain a spike, which read the gradients."""
    engine = fused_engine()
    before = [weight.detach().clone() for weight in engine.model.parameters()]
    loss_of(engine.model).backward()
    assert all(weight.grad is not None for weight in engine.model.parameters())
    assert all(map(torch.equal, engine.model.parameters(), before))


@pytest.mark.parametrize("optimizer", [FP32_MOMENTS, BF16_MOMENTS])
def test_gradients_of_one_layer_exist_at_a_time(optimizer: AdamWConfig) -> None:
    """The plan is within 10% of the peak of a step. Two micro-batches without it need the gradients more."""
    peaks = {}
    batch = MicroBatch(1, LENGTH, Precision.fp32, ActivationCheckpointing.none)
    for fused in (False, True):
        model, _ = build(**LARGE)
        adamw = build_optimizer(parameter_groups(model, optimizer), optimizer)
        engine = FsdpEngine(model, adamw, 0.0, torch.device("cpu"), fused_backward=fused)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            for _ in range(2):  # the first step makes the moments
                live.peak = 0
                for last in [True] if fused else [False, True]:
                    engine.backward(loss_of(model, sequences=1), last=last)
                engine.step(never)
        peaks[fused] = live.peak
        layout = ParallelLayout(Strategy.fsdp, 1)
        memory = rank_memory(model.config, layout, batch, None, optimizer, fused_backward=fused)
        gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
        assert memory.gradients == (0 if fused else gradients)
        assert peaks[fused] == pytest.approx(memory.total, rel=0.1)
    # With moments in bf16, the update needs memory, too, which it now needs in the backward pass.
    saved = gradients - memory.temporaries
    assert peaks[False] - peaks[True] > 0.9 * saved


def test_what_needs_all_gradients_is_refused() -> None:
    one = TrainerConfig(global_batch_size=4, micro_batch_size=4, fused_backward=True)
    cfg = TrainConfig(trainer=one, optimizer=BF16_MOMENTS)
    assert fused_backward_errors(cfg, 1) == []
    for changed, ranks, said in (
        (cfg, 2, "is for one rank, and there are 2"),
        (replace(cfg, parallel=ParallelConfig(strategy=Strategy.deepspeed)), 1, "set parallel.strategy=fsdp"),
        (replace(cfg, optimizer=MuonConfig(max_grad_norm=0)), 1, "set optimizer=adamw"),
        (replace(cfg, optimizer=AdamWConfig()), 1, "optimizer.max_grad_norm=1 clips"),
        (replace(cfg, trainer=replace(one, global_batch_size=8)), 1, "a step must be one micro-batch"),
        (replace(cfg, trainer=replace(one, spike_sigmas=6.0)), 1, "set trainer.spike_sigmas=null"),
        (replace(cfg, trainer=replace(one, ema_decay=0.9)), 1, "set trainer.ema_decay=null"),
    ):
        [error] = fused_backward_errors(changed, ranks)
        assert error.startswith("trainer.fused_backward=true: ")
        assert said in error
