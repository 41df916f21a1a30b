"""The learning rate by hand, and the length of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.optimization import _get_wsd_scheduler_lambda

from olmoe_train.config.choices import DecayShape, Packing, Schedule
from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import SchedulerConfig, TrainConfig, TrainerConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import TrainingData
from olmoe_train.optim.schedule import Schedule as LearningRate
from olmoe_train.planning.duration import schedule_in_words, total_steps, warmup_and_decay_steps
from tests.support.data import write_prepared

COSINE = SchedulerConfig(kind=Schedule.cosine)
WSD: dict[str, Any] = {"kind": Schedule.wsd}


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
    assert LearningRate(COSINE, 10, 10, 110).multiplier(step) == pytest.approx(expected)


def test_linear_to_zero_and_constant() -> None:
    linear = replace(COSINE, kind=Schedule.linear, final_factor=0.0)
    decay = LearningRate(linear, 0, 0, 100)
    assert [decay.multiplier(step) for step in (1, 50, 100)] == pytest.approx([0.99, 0.5, 0])
    constant = replace(COSINE, kind=Schedule.constant)
    assert LearningRate(constant, 10, 10, 100).multiplier(99) == 1.0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # Steps 5, 10, 60 | 61, 70, 80, 100, 101 of a decay over the steps 61 to 100, down to 0.1.
        (DecayShape.linear, [0.55, 1, 1, 0.1 + 0.9 * 39 / 40, 0.775, 0.55, 0.1, 0.1]),
        (
            DecayShape.sqrt,
            [0.55, 1, 1, 0.1 + 0.9 * (1 - 40**-0.5), 0.55, 0.1 + 0.9 * (1 - 0.5**0.5), 0.1, 0.1],
        ),
        (DecayShape.cosine, [0.55, 1, 1, 0.9986128002, 0.1 + 0.9 * 0.8535533906, 0.55, 0.1, 0.1]),
    ],
)
def test_warmup_stable_decay_by_hand(shape: DecayShape, expected: list[float]) -> None:
    schedule = LearningRate(SchedulerConfig(**WSD, decay_shape=shape), 10, 60, 100)
    found = [schedule.multiplier(step) for step in (5, 10, 60, 61, 70, 80, 100, 101)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("shape", DecayShape)
def test_wsd_is_that_of_transformers(shape: DecayShape) -> None:
    # Transformers has the same floor at the start of the warm-up as at the end of the decay.
    cfg = SchedulerConfig(**WSD, decay_shape=shape, warmup_start_factor=0.05, final_factor=0.05)
    name = "1-sqrt" if shape is DecayShape.sqrt else shape.value
    phases = {"num_warmup_steps": 7, "num_stable_steps": 20, "num_decay_steps": 13}
    for step in range(45):
        expected = _get_wsd_scheduler_lambda(
            step, **phases, warmup_type="linear", decay_type=name, min_lr_ratio=0.05, num_cycles=0.5
        )
        assert LearningRate(cfg, 7, 27, 40).multiplier(step) == pytest.approx(expected, rel=1e-12), step


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
        ({}, (0.0, 0.0, 21.0)),
        ({"warmup_steps": 4, "decay_steps": 30}, (4.0, 4.0, 30.0)),
        ({"warmup_tokens": 900, "decay_tokens": 3_000}, (4.5, 4.5, 15.0)),
        ({"warmup_fraction": 0.1, "decay_steps": 30}, (3.0, 3.0, 30.0)),
        (WSD | {"warmup_steps": 4, "decay_length_steps": 6}, (4.0, 15.0, 21.0)),
        (WSD | {"decay_steps": 30, "decay_length_tokens": 900}, (0.0, 25.5, 30.0)),
        (WSD | {"warmup_fraction": 0.9, "decay_tokens": 3_000, "decay_fraction": 0.1}, (13.5, 13.5, 15.0)),
    ],
)
def test_horizons_in_every_unit(scheduler: dict[str, Any], expected: tuple[float, float, float]) -> None:
    cfg = config(**scheduler)
    found = warmup_and_decay_steps(cfg.scheduler, BatchSizes(2, sequence_length=100), last_step=21)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"warmup_tokens": 900}, "warm-up to step 4.5, cosine decay to 10% of the peak at step 21"),
        ({"kind": Schedule.constant}, "constant"),
        (
            WSD | {"warmup_steps": 4, "decay_length_steps": 6, "final_factor": 0.0},
            "warm-up to step 4, stable to step 15, linear decay to 0% of the peak at step 21",
        ),
    ],
)
def test_a_plan_tells_the_schedule(scheduler: dict[str, Any], words: str) -> None:
    assert (
        schedule_in_words(config(**scheduler).scheduler, BatchSizes(2, sequence_length=100), last_step=21)
        == words
    )
