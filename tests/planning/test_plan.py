"""`olmoe plan`: speed, layouts, what fits, errors, and the verb as a command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.cli.plan import check, is_valid
from olmoe_train.config.choices import ActivationCheckpointing, Offload, Reference, Strategy
from olmoe_train.config.objective import GrpoConfig, PreferenceConfig
from olmoe_train.config.train import CheckpointConfig, ParallelConfig, TrainerConfig
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.memory_deepspeed import host_memory
from olmoe_train.planning.report import (
    GIB,
    fits,
    largest_micro_batch,
    memory_lines,
    plan_memory,
    plan_micro_batch,
    plan_speed,
    possible_layouts,
)
from olmoe_train.utils.errors import UserError
from tests.support.commands import olmoe
from tests.support.plans import OLMOE_1B_7B, ONE_SEQUENCE, TOTAL, fsdp, plan_config


def test_speed_of_the_released_run() -> None:
    """23,600 tokens/s a GPU at 7.8787 GFLOP a token are 18.8% of 989.5 TFLOP/s. On 256 GPUs 5.033T tokens at
    256 x 0.188 x 989.5e12 / 7.878672384e9 = 6,044,409 tokens/s are 832,670 s."""
    trainer = TrainerConfig(max_tokens=5_033_000_000_000, global_batch_size=1024, micro_batch_size=4)
    speed = plan_speed(plan_config(gpus=256, trainer=trainer))
    assert speed.tokens_per_step == 4_194_304
    assert speed.steps == 1_199_961
    assert speed.micro_batches == 1
    assert speed.tokens_per_second == pytest.approx(256 * 23_600, rel=1e-3)
    assert speed.days == pytest.approx(832_670 / 86_400, rel=1e-4)
    assert plan_speed(plan_config(gpu_tflops=2 * 989.5)).tokens_per_second == pytest.approx(
        2 * plan_speed(plan_config()).tokens_per_second
    )


def test_layouts_are_those_that_train_takes() -> None:
    layouts = possible_layouts(plan_config(), is_valid)
    zero = [layout for layout in layouts if layout.strategy is Strategy.deepspeed]
    others = [layout for layout in layouts if layout.strategy is not Strategy.deepspeed]
    found = {(x.strategy.name, x.expert_parallel_size, x.replicate_size) for x in others}
    by_copies = {1: (1, 2, 4, 8), 2: (1, 2, 4), 4: (1, 2), 8: (1,)}
    expected = {("fsdp", size, copies) for copies, sizes in by_copies.items() for size in sizes}
    assert found == expected | {("ddp", size, 1) for size in (1, 2, 4, 8)}
    kinds = {(1, Offload.none), (2, Offload.none), (3, Offload.none)}
    kinds |= {(3, Offload.optimizer), (3, Offload.parameters)}
    assert {(x.zero_stage, x.offload) for x in zero} == kinds
    assert len(zero) == len(kinds) * 4


def test_a_copy_for_asynchronous_saves_is_planned_for() -> None:
    """fp32 weights and two moments, 12 bytes a parameter of the rank."""
    told = memory_lines(plan_config(gpus=1, checkpoint=CheckpointConfig(async_save=True)))
    assert f"  copied to the CPU for checkpoint.async_save: {12 * TOTAL / GIB:.2f} GiB per GPU" in told
    assert not any("async_save" in line for line in memory_lines(plan_config(gpus=1)))


def test_deepspeeds_copy_for_a_save_is_planned_for() -> None:
    """12 bytes a parameter, over the ranks; experts over those that have the same ones, 8 / 4."""
    parallel = ParallelConfig(Strategy.deepspeed, 4, zero_stage=2)
    told = memory_lines(plan_config(gpus=8, parallel=parallel))
    assert f"  copied to the CPU for every save: {12 * TOTAL / 8 / GIB:.2f} GiB per GPU" in told
    assert not any("every save" in line for line in memory_lines(plan_config()))


def test_samples_of_several_sequences_are_planned_for() -> None:
    """A pair has two sequences, a prompt of grpo its group; a live reference holds 2 bytes a parameter."""
    plain = plan_config()
    length = plain.data.sequence_length
    live = PreferenceConfig(reference=Reference.live)
    for objective, sequences in ((live, 2), (GrpoConfig(group_size=4), 4)):
        cfg = replace(plain, objective=objective)
        assert plan_micro_batch(cfg).sequences == sequences * plain.trainer.micro_batch_size
        assert plan_speed(cfg).tokens_per_step == sequences * plain.trainer.global_batch_size * length
    told = memory_lines(replace(plan_config(gpus=8), objective=live))
    assert f"  for objective.reference=live, not in the total: {2 * TOTAL / 8 / GIB:.2f} GiB" in told
    assert not any("reference" in line for line in memory_lines(plain))


def test_offloading_fits_the_released_model_on_one_gpu_of_80_gb() -> None:
    """bf16: 2 bytes a parameter stay, 20 more go to the CPU: masters, moments, gradients and their sum."""
    cfg, batch = plan_config(gpus=1), replace(ONE_SEQUENCE, checkpointing=ActivationCheckpointing.full)
    offloaded = ParallelLayout(Strategy.deepspeed, 1, zero_stage=3, offload=Offload.optimizer)
    (memory,) = plan_memory(cfg, offloaded, batch)
    assert memory.state == memory.parameters == 2 * TOTAL
    assert host_memory(OLMOE_1B_7B, offloaded, batch) == 20 * TOTAL
    assert fits(cfg, memory)
    assert not fits(cfg, plan_memory(cfg, replace(offloaded, offload=Offload.none), batch)[0])
    assert not fits(cfg, plan_memory(cfg, fsdp(1), batch)[0])
    nothing_left = replace(offloaded, offload=Offload.parameters)
    assert plan_memory(cfg, nothing_left, batch)[0].state == 0
    assert host_memory(OLMOE_1B_7B, nothing_left, batch) == 22 * TOTAL


def test_what_fits() -> None:
    cfg = plan_config(gpu_memory_gib=40.0, reserve_gib=5.0)
    layout, batch = fsdp(8), replace(ONE_SEQUENCE, sequences=4)
    assert not fits(cfg, plan_memory(cfg, layout, batch)[0])
    most = largest_micro_batch(cfg, layout, batch)
    assert fits(cfg, plan_memory(cfg, layout, replace(batch, sequences=most))[0])
    assert not fits(cfg, plan_memory(cfg, layout, replace(batch, sequences=2 * most))[0])
    exactly = plan_memory(cfg, layout, batch)[0].total / 2**30
    assert fits(replace(cfg, gpu_memory_gib=exactly + 5.0), plan_memory(cfg, layout, batch)[0])
    assert len(plan_memory(cfg, fsdp(8, expert_parallel=2), batch)) == 3  # load factors 1, 2, 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "gpus=0: must be positive"),
        ({"mfu": 40.0}, "40% is mfu=0.4"),
        ({"gpu_tflops": -1.0}, "gpu_tflops=-1.0: must be positive"),
        ({"reserve_gib": 90.0}, "reserve_gib=90.0: must be at least 0 and below gpu_memory_gib=80.0"),
        ({"gpus": 6}, "trainer.micro_batch_size x ranks = 4 x 6 = 24; the nearest is 1032"),
        (
            {"parallel": ParallelConfig(expert_parallel_size=3)},
            "parallel.expert_parallel_size=3: must divide",
        ),
        (
            {"parallel": ParallelConfig(replicate_size=3)},
            "parallel.replicate_size=3: must divide the 8 ranks",
        ),
        (
            {"trainer": TrainerConfig(max_epochs=2, global_batch_size=1024, micro_batch_size=4)},
            "trainer.max_epochs=2: a plan reads no data",
        ),
    ],
)
def test_wrong_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(plan_config(**changes))
    assert message in str(caught.value)


@pytest.mark.slow
def test_the_verb_needs_no_data_and_works_anywhere(tmp_path: Path) -> None:
    # The epochs' length is in the data; the recipe's max_tokens will do.
    options = ("gpus=8", "gpu_memory_gib=80", "trainer.max_epochs=2")
    run = olmoe("plan", "experiment=olmoe_1b_7b_0924", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for text in (
        "6,919,161,856; 1,282,017,280 active per token",
        "7.879 GFLOP",
        "1,024 sequences x 4,096 = 4,194,304 tokens; GPUs x micro-batches x sequences: 8 x 32 x 4",
        "1,199,961 steps",
        "schedule    warm-up to step 2,500, cosine decay to 10% of the peak at step 1,192,092.896",
        "traffic of one GPU per step in GB: fsdp",
    ):
        assert text in run.stdout
    rows = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines() if line.startswith("  ")}
    assert rows["parameters"] == ["3.22"]  # 6,919,161,856 x 4 / 8 / 2^30
    assert rows["optimizer"] == ["6.44"]
    assert run.stdout.count("<- this configuration") == 1
    assert not any(tmp_path.iterdir())

    wrong = olmoe("plan", "experiment=olmoe_1b_7b_0924", "gpus=7", "mfu=2", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "mfu=2.0: is a fraction" in wrong.stderr
    assert "trainer.global_batch_size=1024: must be a multiple" in wrong.stderr
