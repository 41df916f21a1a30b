"""GRPO on several ranks: the completions, losses and weights of one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from olmoe_train.train import train
from tests.support.faults import records, saved_weights
from tests.support.prompts import grpo_values, write_prompts
from tests.support.ranks import run_ranks
from tests.support.runs import compose

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"trainer.micro_batch_size": 2},
    "experts": {"trainer.micro_batch_size": 1, "parallel.expert_parallel_size": 2},
    "ddp, experts": {"trainer.micro_batch_size": 2, "parallel": "ddp", "parallel.expert_parallel_size": 2},
}
Result = tuple[list[dict[str, Any]], dict[str, Tensor]]


def train_layouts(directory: Path, layouts: dict[str, dict[str, Any]]) -> dict[str, Result]:
    results = {}
    for name, layout in layouts.items():
        run_dir = directory / name.replace(", ", "-")
        changes = {"run_dir": run_dir, "trainer.max_steps": 4, "objective.kl_coef": 0.1} | layout
        changes["optimizer.eps"] = 1e-5  # some gradients are nearly 0; see tests/support/runs.py
        train(compose(grpo_values(directory) | changes))
        if dist.get_rank() == 0:
            results[name] = records(run_dir), saved_weights(run_dir)
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    directory = tmp_path_factory.mktemp("grpo")
    write_prompts(directory)
    alone = run_ranks(1, train_layouts, directory, {"alone": {}}, timeout=300)[0]
    return alone | run_ranks(2, train_layouts, directory, LAYOUTS, timeout=300)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_completions_losses_and_weights_are_those_of_one_rank(trained: dict[str, Result], name: str) -> None:
    (found, weights), (expected, expected_weights) = trained[name], trained["alone"]
    assert len(found) == len(expected) == 5
    for step, other in zip(found, expected, strict=True):
        assert step["tokens"] == other["tokens"], "completions of the same lengths"
        for key in (key for key in other if key.endswith(("reward", "reward_std", "loss", "kl"))):
            assert step[key] == pytest.approx(other[key], rel=2e-5, abs=2e-6), (step["step"], key)
    for parameter, value in expected_weights.items():
        assert (weights[parameter] - value).abs().max() < 1e-5, parameter
