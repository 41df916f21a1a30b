"""Batch-size warm-up: which samples each step has, whatever the layout, and the length of a run in tokens."""

import pytest

from olmoe_train.config.choices import Schedule as Kind
from olmoe_train.config.data import DataConfig
from olmoe_train.config.objective import GrpoConfig
from olmoe_train.config.train import BatchSizeStage, SchedulerConfig, TrainConfig, TrainerConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import RankMicroBatches
from olmoe_train.planning.duration import schedule_in_words, total_steps
from olmoe_train.training.batch import StepBatches
from olmoe_train.training.build import build_schedule
from olmoe_train.training.preflight.batch_sizes import batch_size_errors, batch_size_warnings

S = 10
WARMUP = [BatchSizeStage(115, 4), BatchSizeStage(250, 8)]
# 115 tokens are 11.5 sequences: 3 steps of 4 reach them, with 12. 2 steps of 8 more reach 25, with 28.
STEPS = [range(4), range(4, 8), range(8, 12), range(12, 20), range(20, 28), range(28, 44), range(44, 60)]
SIZES = BatchSizes.of(TrainerConfig(global_batch_size=16, batch_size_warmup=WARMUP), S)


def config(micro_batch_size: int = 1, warmup: list[BatchSizeStage] = WARMUP, **trainer: int) -> TrainConfig:
    values = {"global_batch_size": 16, "micro_batch_size": micro_batch_size, "max_tokens": 600} | trainer
    return TrainConfig(
        data=DataConfig(dir="x", sequence_length=S),
        trainer=TrainerConfig(**values, batch_size_warmup=warmup),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (1, 1), (2, 2), (2, 1), (4, 1)])
@pytest.mark.parametrize("done", range(len(STEPS)))
def test_each_step_has_its_samples_on_every_layout_and_from_every_step(
    done: int, world: int, micro: int
) -> None:
    found: list[list[int]] = [[] for _ in STEPS[done:]]
    for rank in range(world):
        stream = (
            {"input_ids": ids} for ids in RankMicroBatches(STEPS[done].start, SIZES, rank, world, micro)
        )
        steps = StepBatches(stream, SIZES, micro * world, ("input_ids",), STEPS[done].start)  # type: ignore[arg-type]
        for number, expected in enumerate(STEPS[done:]):
            for batch in next(steps):
                found[number] += batch["input_ids"]
            assert steps.size == len(expected)
    assert found == [list(expected) for expected in STEPS[done:]]


def test_positions_by_hand() -> None:
    assert SIZES.warmup == ((12, 4), (25, 8))
    assert [SIZES.samples_after(step) for step in range(8)] == [0, 4, 8, 12, 20, 28, 44, 60]
    assert [SIZES.samples_after(2, start) for start in (8, 9, 20, 60)] == [20, 21, 44, 92]
    assert [SIZES.steps_for(samples) for samples in (0, 1, 12, 13, 28, 29, 60)] == [0, 1, 3, 4, 5, 6, 7]
    tokens = [0, 40, 100, 120, 160, 280, 360, 600]
    steps = [0, 1, 2.5, 3, 3.5, 5, 5.5, 7]
    assert [SIZES.step_of_tokens(count) for count in tokens] == pytest.approx(steps)
    assert [SIZES.tokens_after(step) for step in steps] == pytest.approx(tokens)
    assert SIZES.in_words() == "4 to step 3, then 8 to step 5, then 16"
    # A size whose tokens the one before has passed is left out.
    assert BatchSizes(16, ((3, 8), (7, 4)), S).in_words() == "8 to step 1, then 16"


def test_length_and_schedule_count_the_tokens_of_the_warm_up() -> None:
    cfg = config()
    assert total_steps(cfg.trainer, S) == 7  # 600 tokens are 60 sequences
    assert total_steps(config(max_tokens=601).trainer, S) == 8
    scheduler = SchedulerConfig(
        kind=Kind.wsd,
        warmup_tokens=160,
        warmup_start_factor=0.0,
        decay_length_tokens=240,
        final_factor=0.0,
    )
    words = schedule_in_words(scheduler, SIZES, 7)
    assert words == "warm-up to step 3.5, stable to step 5.5, linear decay to 0% of the peak at step 7"
    schedule = build_schedule(TrainConfig(data=cfg.data, trainer=cfg.trainer, scheduler=scheduler), 7)
    # By tokens: 40, 80 and 120 of 160; the decay begins at 360 tokens, and 440 are a third of it.
    rates = [schedule.multiplier(step) for step in range(1, 8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 2 / 3, 0.0])
    # By steps, it proceeds with the steps.
    by_steps = SchedulerConfig(kind=Kind.linear, warmup_steps=4, warmup_start_factor=0.0)
    schedule = build_schedule(TrainConfig(data=cfg.data, trainer=cfg.trainer, scheduler=by_steps), 7)
    assert [schedule.multiplier(step) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_what_is_refused_and_warned_of() -> None:
    assert batch_size_errors(config(), 4) == []
    (found,) = batch_size_errors(config(micro_batch_size=2), 4)
    assert found.startswith("trainer.batch_size_warmup[0].global_batch_size=4: must be a multiple of")
    assert found.endswith("ranks = 2 x 4 = 8; the nearest is 8")
    (found,) = batch_size_errors(config(warmup=[BatchSizeStage(95, 4), BatchSizeStage(90, 8)]), 1)
    assert found.startswith("trainer.batch_size_warmup[1].until_tokens=90: the size before ends at 95")
    grpo = TrainConfig(trainer=TrainerConfig(batch_size_warmup=WARMUP), objective=GrpoConfig())
    assert "objective=grpo counts other samples" in batch_size_errors(grpo, 1)[-1]
    assert batch_size_warnings(config()) == []
    (warning,) = batch_size_warnings(config(max_tokens=280))
    assert warning.startswith("trainer.global_batch_size: no step has 16 sequences; the run ends at step 5")
