"""Runs with objective=grpo on one rank: what they sample, learn, resume and refuse."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.config.train import TrainConfig
from olmoe_train.train import train
from olmoe_train.utils.errors import UserError
from tests.support.faults import metrics, records, same, saved_weights, without_timing
from tests.support.prompts import grpo_values, write_prompts
from tests.support.runs import compose

Config = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grpo")
    write_prompts(directory)
    return directory


@pytest.fixture
def config(parts: Path, tmp_path: Path) -> Config:
    def make(run: str = "run", **changes: Any) -> TrainConfig:
        """changes: values by key, with __ for the dot."""
        values = grpo_values(parts) | {"run_dir": tmp_path / run}
        return compose(values | {key.replace("__", "."): value for key, value in changes.items()})

    return make


def steps(cfg: TrainConfig) -> list[dict[str, Any]]:
    return metrics(cfg.run_dir)


def test_the_reward_rises(config: Config) -> None:
    cfg = config(
        trainer__max_steps=40,
        trainer__global_batch_size=8,
        objective__group_size=8,
        optimizer__lr=5e-3,
        optimizer__max_grad_norm=1.0,
        evaluation__at_start=True,
        loss__router_aux_loss_coef=0,
        loss__router_z_loss_coef=0,
    )
    train(cfg)
    rewards = [record["reward"] for record in steps(cfg)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
    reward = "eval/validation/reward"
    validated = [record[reward] for record in records(cfg.run_dir, reward)]
    assert validated[-1] > validated[0] + 0.2
    assert all(record["rollout/routing_agreement"] > 0.99 for record in steps(cfg))
    assert all(record["rollout/log_prob_difference"] < 1e-4 for record in steps(cfg))


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer__micro_batch_size": 1},
        {"data__packing": "none", "trainer__micro_batch_size": 2},
        {"trainer__activation_checkpointing": "full"},
    ],
    ids=["micro-batches", "padded", "recomputed"],
)
def test_completions_and_losses_do_not_depend_on_the_batch(config: Config, changes: dict[str, Any]) -> None:
    whole, other = config("whole"), config("other", **changes)
    train(whole)
    train(other)
    for one, expected in zip(steps(whole), steps(other), strict=True):
        assert one["reward"] == pytest.approx(expected["reward"], abs=1e-6), "the same completions"
        assert one["tokens"] == expected["tokens"]
        for key in ("train/loss", "train/load_balancing_loss", "reward_std"):
            assert one[key] == pytest.approx(expected[key], rel=2e-5, abs=2e-6)
        assert one["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)


def test_a_run_in_two_parts_is_the_run_in_one(config: Config) -> None:
    changes = {"trainer__max_steps": 6, "objective__kl_coef": 0.1}
    whole = config("whole", **changes)
    train(whole)
    for end in (3, 6):
        cfg = config("parts", trainer__stop_at_step=end, **changes)
        train(cfg)
    for one, other in zip(steps(whole), steps(cfg), strict=True):
        assert without_timing(one) == without_timing(other)
    assert steps(cfg)[0]["kl"] == 0
    assert steps(cfg)[-1]["kl"] > 0, "the reference stays where the run began"
    assert same(saved_weights(whole.run_dir, 6), saved_weights(cfg.run_dir, 6))


def test_configurations_that_make_no_sense_are_refused(config: Config, parts: Path) -> None:
    refused: dict[str, dict[str, Any]] = {
        "objective.group_size=1: must be at least 2": {"objective__group_size": 1},
        "objective.max_new_tokens=32: must be below data.sequence_length=32": {
            "objective__max_new_tokens": 32
        },
        "data.packing=concat: cuts documents": {"data__packing": "concat"},
        "objective.reward_pattern: has no value": {
            "objective__reward": "regex",
            "objective__reward_function": "null",
        },
        "objective.reward_function=x.py:f: has no effect": {
            "objective__reward": "exact",
            "objective__reward_function": "x.py:f",
        },
        "objective.reward_function=x.py:f: no such file": {"objective__reward_function": "x.py:f"},
        "parallel.strategy=deepspeed: objective=grpo samples": {"parallel": "deepspeed"},
        "adapter.router=full changes that model": {
            "objective__kl_coef": 0.1,
            "adapter": "lora",
            "adapter__router": "full",
        },
    }
    for message, changes in refused.items():
        with pytest.raises(UserError) as error:
            train(config("refused", **changes))
        assert message in str(error.value)
