"""The average of the weights: by its definition, on skipped steps, and in the place of the weights."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from olmoe_train.config.choices import Strategy
from olmoe_train.config.optimizer import AdamWConfig, MuonConfig, OptimizerConfig, RMSpropConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.optim.average import AVERAGE, averages_as_weights, keep_average, parameters_of
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import parameter_groups
from olmoe_train.optim.skip_step import step_unless
from olmoe_train.training.preflight.checks import configuration_errors
from tests.support.tiny import backward, build, global_batch, train_step

DECAY = 0.75


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("cfg", [AdamWConfig(lr=0.1), MuonConfig(lr=0.1), RMSpropConfig(lr=0.1)])
def test_the_average_is_that_of_its_definition(cfg: OptimizerConfig) -> None:
    """e begins with the first weights, moves by every update, and not by a step that is skipped."""
    model, _ = build()
    optimizer = build_optimizer(parameter_groups(model, cfg), cfg)
    keep_average(optimizer, DECAY)
    expected = {p: local_tensor(p.detach()).double() for p in model.parameters()}
    for step in range(4):
        backward(model, global_batch(step))
        skip = step in (0, 2)
        if skip:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.nan)
        step_unless(optimizer, torch.tensor(skip))
        optimizer.zero_grad()
        for parameter, average in expected.items():
            weight = local_tensor(parameter.detach())
            if not skip:
                average.mul_(DECAY).add_(weight.double(), alpha=1 - DECAY)
            found = local_tensor(optimizer.state.get(parameter, {}).get(AVERAGE, weight))
            assert torch.allclose(found.double(), average, rtol=0, atol=1e-6)
            assert skip or not torch.equal(found, weight)


def test_the_average_takes_the_place_of_the_weights_and_gives_it_back() -> None:
    """Also after passes that leave gathered weights, whose next pass must not use them."""
    model, optimizer = build()
    keep_average(optimizer, DECAY)
    for step in range(2):
        train_step(model, optimizer, step)
    twin, plain = build()
    for step in range(2):
        train_step(twin, plain, step)
    parameters = list(parameters_of(optimizer))
    before = [p.detach().clone() for p in parameters]
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in parameters]

    def loss() -> float:
        with torch.no_grad():
            ids_BS = global_batch(9)
            return model.training_forward(ids_BS, ids_BS).ce_sum.item()

    own = loss()
    with averages_as_weights(model, optimizer):
        of_average = loss()
        assert all(torch.equal(p, kept[AVERAGE]) for p, kept in zip(parameters, state, strict=True))
    assert of_average != own
    assert loss() == own
    assert all(map(torch.equal, before, parameters))
    for parameter, kept in zip(parameters, state, strict=True):
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in kept.items())
    # The run goes on as one without an average.
    assert train_step(model, optimizer, 2) == train_step(twin, plain, 2)
    assert all(map(torch.equal, parameters, parameters_of(plain)))


def test_a_weight_that_rests_is_its_own_average() -> None:
    weight = nn.Parameter(torch.tensor([0.1, -3.3, 1e-20]))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    keep_average(optimizer, 0.999)
    for _ in range(3):
        weight.grad = torch.zeros(3)
        step_unless(optimizer, torch.tensor(False))
    assert torch.equal(optimizer.state[weight][AVERAGE], weight)


def test_what_cannot_be_averaged_is_refused() -> None:
    trainer = TrainerConfig(global_batch_size=8, micro_batch_size=8, max_steps=1, ema_decay=1.0)
    [error] = configuration_errors(TrainConfig(trainer=trainer), 1)
    assert error.startswith("trainer.ema_decay=1.0: must be above 0 and below 1")
    parallel = ParallelConfig(strategy=Strategy.deepspeed)
    cfg = TrainConfig(trainer=replace(trainer, ema_decay=0.9), parallel=parallel)
    [error] = configuration_errors(cfg, 1)
    assert error.startswith("trainer.ema_decay=0.9: with parallel.strategy=deepspeed the fp32 weights are in")
