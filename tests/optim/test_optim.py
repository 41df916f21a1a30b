"""The learning rate by hand, and the length of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.config.choices import Packing, Schedule
from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import SchedulerConfig, TrainConfig, TrainerConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.optim.schedule import Schedule as LearningRate
from olmoe_train.planning.duration import total_steps, warmup_and_decay_steps
from tests.support.data import write_prepared

COSINE = SchedulerConfig(kind=Schedule.cosine)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (5, 0.55),  # half-way from 0.1 at step 0 to 1 at step 10
        (10, 1.0),
        (60, 0.55),  # half-way down from 1 to 0.1
        (35, 0.1 + 0.9 * 0.8535533905932737),  # (1 + cos(pi / 4)) / 2
        (110, 0.1),
        (500, 0.1),
    ],
)
def test_cosine_with_warmup(step: int, expected: float) -> None:
    assert LearningRate(COSINE, 10, 110).multiplier(step) == pytest.approx(expected)


def test_linear_to_zero_and_constant() -> None:
    linear = replace(COSINE, kind=Schedule.linear, final_factor=0.0)
    decay = LearningRate(linear, 0, 100)
    assert [decay.multiplier(step) for step in (1, 50, 100)] == pytest.approx([0.99, 0.5, 0])
    constant = replace(COSINE, kind=Schedule.constant)
    assert LearningRate(constant, 10, 100).multiplier(99) == 1.0


def config(**scheduler: object) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(dir="x", sequence_length=100),
        trainer=TrainerConfig(max_steps=50, max_tokens=4_150, global_batch_size=2),
        scheduler=SchedulerConfig(**scheduler),  # type: ignore[arg-type]
    )


def test_the_first_limit_ends_the_run() -> None:
    # 200 tokens a step: 4150 tokens need 21 steps, fewer than 50.
    cfg = config()
    assert total_steps(cfg.trainer, cfg.data.sequence_length) == 21


@pytest.mark.parametrize(
    ("epochs", "packing", "steps"),
    [
        (1, Packing.concat, 9),  # 17 sequences of 4, 2 a step: the last one has one of the next epoch
        (2, Packing.concat, 17),
        (0.5, Packing.concat, 4),
        (2, Packing.best_fit, 20),  # each document of 7 fills one sequence and most of another
    ],
)
def test_epochs_are_rounded_up_to_whole_steps(
    tmp_path: Path, epochs: float, packing: Packing, steps: int
) -> None:
    directory = write_prepared(tmp_path / "data", [[5] * 6] * 10)
    data = DataConfig(dir=str(directory), sequence_length=4, packing=packing)
    trainer = TrainerConfig(max_steps=50, max_epochs=epochs, global_batch_size=2)
    epoch = TrainingData(data, seed=0).samples.epoch
    assert total_steps(trainer, 4, epoch) == steps
    assert total_steps(replace(trainer, max_steps=3), 4, epoch) == 3


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({}, (0.0, 21.0)),
        ({"warmup_steps": 4, "decay_steps": 30}, (4.0, 30.0)),
        ({"warmup_tokens": 900, "decay_tokens": 3_000}, (4.5, 15.0)),
        ({"warmup_fraction": 0.1, "decay_steps": 30}, (3.0, 30.0)),
    ],
)
def test_horizons_in_every_unit(scheduler: dict[str, Any], expected: tuple[float, float]) -> None:
    cfg = config(**scheduler)
    found = warmup_and_decay_steps(cfg.scheduler, tokens_per_step=200, last_step=21)
    assert found == pytest.approx(expected)
