"""AdamW with moments in bf16: its update by definition, its checkpoints, its memory, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from olmoe_train.checkpoint.directory import checkpoint_path
from olmoe_train.checkpoint.sharded import load_checkpoint, save_checkpoint
from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.optimizer import ADAMW_STATE, AdamWConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.optim import adamw_bf16
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import parameter_groups
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.live_memory import LiveBytes
from olmoe_train.planning.memory import MicroBatch, rank_memory
from olmoe_train.planning.memory_optimizer import update_bytes
from olmoe_train.training.preflight.parallel import parallel_errors
from tests.support.sizes import SIZES
from tests.support.tiny import build, train_step

BF16 = AdamWConfig(lr=0.01, moments_dtype=Precision.bf16)


@pytest.mark.parametrize("at_once", [4, 2**24])
def test_three_updates_are_those_of_the_definition(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, with moments that are rounded between the steps. The first step is that of torch's AdamW."""
    monkeypatch.setattr(adamw_bf16, "UPDATE_ELEMENTS", at_once)
    torch.manual_seed(0)
    first, gradients = torch.randn(3, 5), [torch.randn(3, 5) for _ in range(3)]
    weight, other = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    optimizer, fp32 = build_optimizer([weight], BF16), build_optimizer([other], AdamWConfig(lr=0.01))
    expected, mean, square = first.double(), torch.zeros(3, 5).double(), torch.zeros(3, 5).double()
    for step, gradient in enumerate(gradients, 1):
        weight.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        fp32.step()
        g = gradient.double()
        mean, square = 0.9 * mean + 0.1 * g, 0.95 * square + 0.05 * g * g
        ratio = mean / (1 - 0.9**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * ratio
        mean, square = mean.float().bfloat16().double(), square.float().bfloat16().double()
        assert torch.allclose(weight.double(), expected, rtol=0, atol=1e-6)
        assert torch.allclose(weight, other, rtol=0, atol=1e-6) is (step == 1)
    state = optimizer.state[weight]
    assert state["step"] == 3
    for key, value in zip(ADAMW_STATE, (mean, square), strict=True):
        assert state[key].dtype is torch.bfloat16
        assert torch.allclose(state[key].double(), value, rtol=2**-7, atol=0)


@pytest.fixture
def no_process_group() -> Iterator[None]:
    yield
    dist.destroy_process_group()


def start(cfg: AdamWConfig) -> tuple[OlmoeForCausalLM, torch.optim.Optimizer]:
    model, _ = build()
    return model, build_optimizer(parameter_groups(model, cfg), cfg)


def test_a_checkpoint_keeps_every_bit_and_becomes_bf16(tmp_path: Path, no_process_group: None) -> None:
    for kind in (AdamWConfig(lr=0.01), BF16):
        model, optimizer = start(kind)
        for step in range(2):
            train_step(model, optimizer, step)
        save_checkpoint(tmp_path / kind.moments_dtype.value, 2, model, optimizer, {})
        loaded, other = start(BF16)
        load_checkpoint(checkpoint_path(tmp_path / kind.moments_dtype.value, 2), loaded, other)
        for one, two in zip(model.parameters(), loaded.parameters(), strict=True):
            for key in ADAMW_STATE:
                expected, found = (
                    local_tensor(x) for x in (optimizer.state[one][key], other.state[two][key])
                )
                assert found.dtype is torch.bfloat16
                assert torch.equal(found, expected.bfloat16())
    assert train_step(loaded, other, 2) == train_step(model, optimizer, 2)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


def test_a_plan_counts_half_of_the_moments_and_the_update() -> None:
    shapes, layout = OlmoeConfig(**SIZES), ParallelLayout(Strategy.fsdp, 1)
    batch = MicroBatch(1, 16, Precision.fp32, ActivationCheckpointing.none)
    memory = rank_memory(shapes, layout, batch, optimizer=BF16)
    assert memory.optimizer == memory.gradients
    model = OlmoeForCausalLM(shapes)
    optimizer = build_optimizer(list(model.parameters()), BF16)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    with LiveBytes([*model.parameters(), *gradients, *moments]) as live:
        held = live.now()
        optimizer.step()
    planned = update_bytes(shapes, layout, BF16)
    assert 0.6 * planned < live.peak - held <= planned


def test_betas_that_bf16_cannot_follow_and_deepspeed_are_refused() -> None:
    assert BF16.errors() == []
    assert AdamWConfig(betas=(0.9, 0.999)).errors() == []
    [error] = AdamWConfig(betas=(0.9, 0.999), moments_dtype=Precision.bf16).errors()
    assert error.startswith("optimizer.betas=[0.9, 0.999]: with optimizer.moments_dtype=bf16 each must be")
    cfg = TrainConfig(
        optimizer=BF16,
        parallel=ParallelConfig(strategy=Strategy.deepspeed),
        trainer=TrainerConfig(global_batch_size=8, micro_batch_size=8),
    )
    [error] = parallel_errors(cfg, world_size=1)
    assert error.startswith("optimizer.moments_dtype=bf16: with parallel.strategy=deepspeed")
