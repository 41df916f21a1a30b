"""Checkpoints whose optimizer is another one than that of the run that loads them."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from olmoe_train.checkpoint.directory import checkpoint_path
from olmoe_train.checkpoint.sharded import load_checkpoint, save_checkpoint
from olmoe_train.config.optimizer import MATRICES, AdamWConfig, MuonConfig, OptimizerConfig, RMSpropConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.roles import role_of
from olmoe_train.optim.average import AVERAGE, keep_average
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import parameter_groups
from tests.support.tiny import build, train_step


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    dist.destroy_process_group()


def start(cfg: OptimizerConfig, averaged: bool) -> tuple[OlmoeForCausalLM, torch.optim.Optimizer]:
    model, _ = build(num_hidden_layers=1)
    optimizer = build_optimizer(parameter_groups(model, cfg), cfg)
    if averaged:
        keep_average(optimizer, 0.9)
    return model, optimizer


ADAMW, MUON, RMSPROP = AdamWConfig(), MuonConfig(), RMSpropConfig(momentum=0.9)
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("before", "now", "of_matrices", "of_others"),
    [
        (ADAMW, ADAMW, MOMENTS, MOMENTS),
        (ADAMW, MUON, set(), MOMENTS),
        (MUON, ADAMW, set(), MOMENTS),
        (RMSPROP, MUON, set(), set()),  # both have a momentum_buffer, of gradients and of their quotients
        (ADAMW, RMSPROP, set(), set()),
    ],
    ids=lambda value: value.name if isinstance(value, OptimizerConfig) else "",
)
@pytest.mark.parametrize("averaged", [(True, False), (False, True), (True, True)])
def test_another_optimizer_begins_anew_where_its_rule_is_another(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    before: OptimizerConfig,
    now: OptimizerConfig,
    of_matrices: set[str],
    of_others: set[str],
    averaged: tuple[bool, bool],
) -> None:
    model, optimizer = start(before, averaged[0])
    for step in range(2):
        train_step(model, optimizer, step)
    save_checkpoint(tmp_path, 2, model, optimizer, {})
    model, optimizer = start(now, averaged[1])
    train_step(model, optimizer, 5)  # whatever was there before is gone after loading
    with caplog.at_level(logging.WARNING):
        load_checkpoint(checkpoint_path(tmp_path, 2), model, optimizer)
    kept = {AVERAGE} if all(averaged) else set()
    for name, parameter in model.named_parameters():
        of_rule = of_matrices if role_of(name) in MATRICES else of_others
        assert set(optimizer.state.get(parameter, {})) == of_rule | kept, name
    text = "\n".join(caplog.messages)
    assert text.count("begins anew") == (not of_matrices) * 2 + (not of_others) * 4
    if (before, now) == (MUON, ADAMW):
        assert (
            "has momentum_buffer of the parameters with the role matrix, and their rule is now adamw, which "
            "needs exp_avg and exp_avg_sq: their optimizer state begins anew"
        ) in text
    assert ("has no average of the weights" in text) is (averaged == (False, True))
    assert ("which this run does not continue" in text) is (averaged == (True, False))
    weights = [p.detach().clone() for p in model.parameters()]
    train_step(model, optimizer, 2)
    moved = zip(weights, model.parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in moved)
