"""The generated DeepSpeed JSON, a user's own merged into it, and what is refused, with the nearest that
works."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.config.choices import ActivationCheckpointing, Offload, Precision, Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.train import (
    CheckpointConfig,
    ParallelConfig,
    TrainConfig,
    TrainerConfig,
)
from olmoe_train.distributed.deepspeed_config import deepspeed_config
from olmoe_train.training.preflight.checks import configuration_errors
from olmoe_train.utils.errors import UserError

TRAINER = TrainerConfig(max_steps=1, global_batch_size=16, micro_batch_size=2, precision=Precision.fp32)


def config(trainer: TrainerConfig = TRAINER, **parallel: object) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(dir="none"),
        trainer=trainer,
        optimizer=AdamWConfig(max_grad_norm=0.5),
        parallel=ParallelConfig(strategy=Strategy.deepspeed, **parallel),  # type: ignore[arg-type]
    )


def generated(cfg: TrainConfig, world_size: int = 1, cuda: bool = False) -> dict[str, Any]:
    return deepspeed_config(cfg.trainer, cfg.parallel, cfg.optimizer.max_grad_norm, world_size, cuda)


def with_file(tmp_path: Path, content: object) -> TrainConfig:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return config(deepspeed_config=str(path))


def test_the_generated_json_says_what_the_options_say() -> None:
    made = generated(config(zero_stage=3, offload=Offload.parameters), world_size=4, cuda=True)
    assert made["train_batch_size"] == 16
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": False}
    assert made["zero_optimization"]["stage"] == 3
    for what in ("offload_optimizer", "offload_param"):
        assert made["zero_optimization"][what] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in generated(config(offload=Offload.optimizer))["zero_optimization"]


def test_a_users_json_adds_to_it(tmp_path: Path) -> None:
    theirs = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7, "overlap_comm": True},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "wall_clock_breakdown": True,
    }
    made = generated(with_file(tmp_path, theirs))
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["zero_optimization"]["overlap_comm"] is True
    assert made["zero_optimization"]["allgather_bucket_size"] > 0
    assert made["wall_clock_breakdown"] is True
    assert (made["train_batch_size"], made["gradient_clipping"]) == (16, 0.5)


def test_every_conflict_is_named_with_the_key_to_set(tmp_path: Path) -> None:
    theirs = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "train_batch_size": 32,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW"},
        "fp16": {"enabled": "auto"},
        "communication_data_type": "bf16",
    }
    with pytest.raises(UserError) as caught:
        generated(with_file(tmp_path, theirs))
    text = str(caught.value)
    assert str(tmp_path / "mine.json") in text
    for line in (
        "zero_optimization.stage=1: set parallel.zero_stage instead (it is 2 here)",
        'zero_optimization.offload_optimizer.device="cpu": set parallel.offload instead (it is null here)',
        "train_batch_size=32: set trainer.global_batch_size instead (it is 16 here)",
        "bf16.enabled=true: set trainer.precision instead (it is false here)",
        "optimizer: it is set by optimizer.*",
        "fp16: it is set by trainer.precision",
        'communication_data_type="bf16": olmoe-train needs its own value (it is "fp32" here)',
    ):
        assert f"- {line}" in text
    assert text.count("\n  - ") == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "must be a JSON object"), (None, "cannot be read: No such file")],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, content: str | None, message: str) -> None:
    cfg = with_file(tmp_path, content or "")
    if content is None:
        (tmp_path / "mine.json").unlink()
    with pytest.raises(UserError, match=f"parallel.deepspeed_config=.*mine.json: {message}"):
        generated(cfg)


@pytest.mark.parametrize("file", ["global_step8", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_native_checkpoints_are_not_loaded(tmp_path: Path, file: str) -> None:
    (tmp_path / file).touch()
    cfg = replace(config(), checkpoint=CheckpointConfig(resume=str(tmp_path)))
    (error,) = configuration_errors(cfg, world_size=2)
    assert f"checkpoint.resume={tmp_path}: this is DeepSpeed's own checkpoint format" in error
    assert "model.init_from" in error


BF16 = replace(TRAINER, precision=Precision.bf16)
SELECTIVE = replace(TRAINER, activation_checkpointing=ActivationCheckpointing.selective)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config(zero_stage=4), "parallel.zero_stage=4: must be 0, 1, 2 or 3"),
        (config(BF16, zero_stage=0), "set parallel.zero_stage=1"),
        (config(zero_stage=0, offload=Offload.optimizer), "set zero_stage=2"),
        (config(zero_stage=2, offload=Offload.parameters), "set zero_stage=3"),
        (config(BF16, zero_stage=2, offload=Offload.optimizer), "set zero_stage=3, which sums in fp32"),
        (config(replace(TRAINER, compile=True), zero_stage=3), "set zero_stage=2, or parallel.strategy=fsdp"),
        (config(SELECTIVE, zero_stage=3), "set trainer.activation_checkpointing=full"),
        (
            config(replace(TRAINER, spike_sigmas=6.0)),
            "set trainer.spike_sigmas=null, or parallel.strategy=fsdp",
        ),
        (config(replicate_size=2), "set parallel.strategy=fsdp for HSDP"),
        (config(expert_parallel_size=4), "parallel.expert_parallel_size=4: must divide the number of ranks"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_with_the_nearest_that_works(
    cfg: TrainConfig, message: str
) -> None:
    (error,) = configuration_errors(cfg, world_size=2)
    assert message in error


@pytest.mark.parametrize(
    "cfg",
    [
        config(zero_stage=0),
        config(BF16, zero_stage=1, expert_parallel_size=2),
        config(replace(BF16, micro_batch_size=8), zero_stage=2, offload=Offload.optimizer),
        config(replace(TRAINER, compile=True), zero_stage=2),
        config(SELECTIVE, zero_stage=2, offload=Offload.optimizer),
        config(zero_stage=3, offload=Offload.parameters),
    ],
)
def test_what_it_can_do_is_not(cfg: TrainConfig) -> None:
    assert configuration_errors(cfg, world_size=2) == []
