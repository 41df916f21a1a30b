"""Which updates are skipped, by hand: losses and gradient norms in, decisions out; by any optimizer."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from olmoe_train.config.choices import Precision
from olmoe_train.config.optimizer import AdamWConfig, MuonConfig, RMSpropConfig
from olmoe_train.config.train import TrainerConfig
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.skip_step import ENOUGH, WINDOW, SkipGuard, step_unless
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
NAN = math.nan


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    init_distributed("cpu")
    yield
    dist.destroy_process_group()


class Guarded:
    """A guard, and an optimizer whose only parameter counts the updates."""

    def __init__(self, **cfg: object) -> None:
        self.guard = SkipGuard(TrainerConfig(**cfg), None, CPU)  # type: ignore[arg-type]
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.AdamW([self.weight], lr=1.0, weight_decay=0.0, fused=True)
        self.step = 0

    def skips(self, loss: float, grad_norm: float) -> bool:
        self.step += 1
        self.weight.grad = torch.full((1,), NAN if math.isnan(grad_norm) else 1.0)
        before = self.weight.detach().clone()
        skip = self.guard.judge(self.step, torch.tensor(loss), torch.tensor(grad_norm))
        step_unless(self.optimizer, skip)
        assert self.weight.isfinite().all()
        return torch.equal(before, self.weight)


def test_only_what_is_not_finite_is_skipped_without_a_spike_guard() -> None:
    run = Guarded()
    values = [(1.0, 1.0), (1.0, NAN), (NAN, 1.0), (math.inf, 1.0), (1.0, math.inf), (1e9, 1e9), (1.0, 1.0)]
    assert [run.skips(*pair) for pair in values] == [False, True, True, True, True, False, False]
    assert run.optimizer.state[run.weight]["step"] == 3
    assert run.guard.check(run.step) == 4


def muon_group(parameters: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """A group for AdamW's rule of Muon, as of a norm."""
    return [{"params": parameters, "rule": "adamw", "matrices_per_row": [1]}]


OPTIMIZERS: list[Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.AdamW(parameters, fused=True),
    lambda parameters: torch.optim.AdamW(parameters, fused=False, foreach=False),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    lambda parameters: torch.optim.Adagrad(parameters),
    lambda parameters: build_optimizer(parameters, RMSpropConfig()),
    lambda parameters: build_optimizer(parameters, AdamWConfig(moments_dtype=Precision.bf16)),
    lambda parameters: build_optimizer(muon_group(parameters), MuonConfig()),
]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_no_optimizer_applies_a_step_that_is_skipped(
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build([weight])
    weight.grad = torch.full((3,), NAN)
    step_unless(optimizer, torch.tensor(True))
    assert torch.equal(weight, torch.ones(3))
    weight.grad = torch.ones(3)
    step_unless(optimizer, torch.tensor(False))
    assert (weight < 1).all()
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_is_beyond_so_many_deviations_of_the_window(which: int) -> None:
    run = Guarded(spike_sigmas=4.0)

    def skips(value: float) -> bool:
        return run.skips(*((value, 1.0) if which == 0 else (1.0, value)))

    # Until there are ENOUGH steps nothing is a spike; half 1 and half 3: mean 2, deviation 1, limit 6.
    assert not any(skips(float(value)) for value in [1, 3] * (ENOUGH // 2))
    assert not skips(5.9)
    assert skips(7.0)
    # Neither the spike nor a NaN blinds the guard for the steps after it.
    assert skips(NAN)
    assert [skips(2.0), skips(40.0), skips(2.0), skips(1e9)] == [False, True, False, True]


def test_a_new_level_is_accepted_in_the_end() -> None:
    run = Guarded(spike_sigmas=4.0)
    for value in [1.0, 3.0] * (WINDOW // 2):
        assert not run.skips(value, 1.0)
    skipped = [run.skips(10.0, 1.0) for _ in range(30)]
    assert skipped[0]
    assert not skipped[-1]


def test_the_budget_is_of_the_window_and_not_of_the_run() -> None:
    run = Guarded(max_skipped_steps=2)
    for _ in range(2):
        for _ in range(2):
            assert run.skips(1.0, NAN)
        for _ in range(WINDOW):
            assert not run.skips(1.0, 1.0)
        run.guard.check(run.step)
    assert all(run.skips(1.0, NAN) for _ in range(2))
    assert run.guard.check(run.step) == 6
    run.skips(1.0, NAN)
    with pytest.raises(FloatingPointError, match=r"3 of the last 128 updates.*trainer.max_skipped_steps=2"):
        run.guard.check(run.step)


def decide_on_two_ranks() -> list[float]:
    """Steps whose loss jumps on rank 1 alone; whether each is skipped."""
    run = Guarded(spike_sigmas=4.0)
    skipped = []
    for step in range(ENOUGH + 1):
        share = 100.0 if step == ENOUGH and dist.get_rank() == 1 else 0.5 + step % 2
        run.skips(share, 1.0)
        skipped.append(run.optimizer.found_inf.item())  # type: ignore[attr-defined]
    return skipped


@pytest.mark.ranks
def test_ranks_decide_alike() -> None:
    expected = [0.0] * ENOUGH + [1.0]
    assert run_ranks(2, decide_on_two_ranks) == [expected, expected]


def test_what_is_saved_comes_back() -> None:
    run = Guarded(spike_sigmas=4.0)
    for value in (1.0, 2.5, NAN, 3.0):
        run.skips(value, value)
    state = run.guard.state()
    assert SkipGuard(TrainerConfig(), state, CPU).state() == state
    assert state["losses"][1:6] == [1.0, 2.5, None, 3.0, None]
