"""What a user gets wrong and the message read in return; and that every option is documented."""

import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from olmoe_train import config as schemas
from olmoe_train.cli import app
from olmoe_train.cli.app import run_verb
from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import (
    BalanceScope,
    Device,
    ExpertsBackend,
    Precision,
    Schedule,
    Strategy,
    StripPrefix,
)
from olmoe_train.config.data import DataConfig, MixtureSource, OlmoFilesConfig, SourceConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.reference import documented_keys, help_text
from olmoe_train.config.train import (
    CheckpointConfig,
    LossConfig,
    ParallelConfig,
    SchedulerConfig,
    TrainConfig,
    TrainerConfig,
)
from olmoe_train.training.preflight.backend import backend_errors
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils.errors import UserError
from tests.support.commands import olmoe
from tests.support.data import write_prepared


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_prepared(tmp_path_factory.mktemp("data") / "prepared", [[5] * 100], [[6] * 100]))


def good(prepared: str, **changes: object) -> TrainConfig:
    sections = {
        "model": ModelConfig(vocab_size=1024, eos_token_id=0),
        "data": DataConfig(dir=prepared, sequence_length=32),
        "trainer": TrainerConfig(max_steps=4, global_batch_size=8, micro_batch_size=2),
    }
    return TrainConfig(**sections | changes)  # type: ignore[arg-type]


def problems(cfg: TrainConfig, world_size: int = 2) -> list[str]:
    with pytest.raises(UserError) as caught:
        validate(cfg, world_size)
    return str(caught.value).split("\n  - ")[1:]


def test_a_good_config_has_neither_errors_nor_warnings(prepared: str) -> None:
    assert validate(good(prepared), world_size=2) == []


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        (
            "trainer",
            TrainerConfig(max_steps=4, global_batch_size=10, micro_batch_size=2),
            "trainer.micro_batch_size x ranks = 2 x 2 = 4; the nearest is 8",
        ),
        (
            "trainer",
            TrainerConfig(global_batch_size=8, micro_batch_size=2),
            "trainer.max_steps, max_tokens and max_epochs are all null",
        ),
        (
            "trainer",
            TrainerConfig(max_steps=0, global_batch_size=8, micro_batch_size=2),
            "trainer.max_steps=0: must be positive",
        ),
        (
            "optimizer",
            AdamWConfig(betas=(0.9, 1.0)),
            "optimizer.betas=[0.9, 1.0]: each must be in [0, 1)",
        ),
        ("optimizer", AdamWConfig(max_grad_norm=-1), "optimizer.max_grad_norm=-1: must not be negative"),
        (
            "scheduler",
            SchedulerConfig(warmup_steps=3, warmup_tokens=4),
            "scheduler.warmup_steps=3 and scheduler.warmup_tokens=4: set only one of them",
        ),
        ("scheduler", SchedulerConfig(final_factor=2), "scheduler.final_factor=2: must be between 0 and 1"),
        (
            "scheduler",
            SchedulerConfig(kind=Schedule.wsd),
            "scheduler.kind=wsd: how long is its decay? Set one",
        ),
        (
            "scheduler",
            SchedulerConfig(kind=Schedule.wsd, warmup_steps=2, decay_length_steps=3),
            "a decay of 3 steps does not fit in between the end of the warm-up at step 2 and the end of the",
        ),
        (
            "parallel",
            ParallelConfig(replicate_size=3),
            "parallel.replicate_size=3: must divide the 2 ranks",
        ),
        (
            "parallel",
            ParallelConfig(expert_parallel_size=4),
            "share a copy of the model, which is 2; try 2",
        ),
        (
            "parallel",
            ParallelConfig(expert_parallel_size=2, replicate_size=2),
            "share a copy of the model, which is 1; try 1",
        ),
        (
            "model",
            ModelConfig(vocab_size=1024, eos_token_id=0, num_experts=9, num_experts_per_tok=2),
            "parallel.expert_parallel_size=2: must divide model.num_experts=9",
        ),
        (
            "model",
            ModelConfig(vocab_size=1024, eos_token_id=0, num_experts=1, num_experts_per_tok=1),
            "parallel.expert_parallel_size=2: a dense model (model.num_experts=1) has no experts",
        ),
        (
            "parallel",
            ParallelConfig(strategy=Strategy.ddp, replicate_size=2),
            "parallel.replicate_size=2: has no meaning with parallel.strategy=ddp",
        ),
        (
            "model",
            ModelConfig(vocab_size=512, eos_token_id=0),
            "model.vocab_size=512: the data in data.dir",
        ),
        (
            "model",
            ModelConfig(vocab_size=1024, eos_token_id=7),
            "model.eos_token_id=7: documents in data.dir",
        ),
        (
            "model",
            ModelConfig(vocab_size=1024, eos_token_id=0, max_position_embeddings=16),
            "data.sequence_length=32: is longer than model.max_position_embeddings=16; lower",
        ),
        (
            "model",
            ModelConfig(vocab_size=1024, eos_token_id=0, init_from="nowhere"),
            "model.init_from=nowhere: neither an HF directory (config.json) nor a run directory or OLMo",
        ),
        (
            "checkpoint",
            CheckpointConfig(resume="nowhere"),
            "checkpoint.resume=nowhere: must be auto, never, or an existing checkpoint directory",
        ),
        ("data", DataConfig(dir="nowhere", sequence_length=32), "olmoe prepare"),
        (
            "data",
            DataConfig(dir="nowhere", mixture=[MixtureSource("web")], sequence_length=32),
            "data.mixture[0]: give either weight or tokens",
        ),
        (
            "data",
            DataConfig(dir="nowhere", mixture=[MixtureSource("web", weight=1)], sequence_length=32),
            "data.dir=nowhere/web: no prepared data there",
        ),
        (
            "trainer",
            TrainerConfig(max_epochs=0, global_batch_size=8, micro_batch_size=2),
            "trainer.max_epochs=0: must be positive",
        ),
        (
            "checkpoint",
            CheckpointConfig(allow_changes=["optimizer.rate"]),
            "checkpoint.allow_changes=[optimizer.rate]: there is no such key or section; --help lists",
        ),
    ],
)
def test_one_mistake_one_message(prepared: str, section: str, value: object, message: str) -> None:
    # Expert parallelism over the 2 ranks is right, unless the mistake is about it.
    found = problems(good(prepared, **{"parallel": ParallelConfig(expert_parallel_size=2), section: value}))
    assert len(found) == 1, found
    assert message in found[0]


def test_changes_may_be_allowed_by_the_older_spelling_of_a_key(prepared: str) -> None:
    checkpoint = CheckpointConfig(allow_changes=["loss.balance_scope", "balancing.scope", "optimizer"])
    assert validate(good(prepared, checkpoint=checkpoint), world_size=2) == []


def test_a_sequence_has_two_tokens_at_least(prepared: str) -> None:
    [message] = problems(good(prepared, data=DataConfig(dir=prepared, sequence_length=1)))
    assert message.startswith("data.sequence_length=1: must be at least 2")


def test_cuda_without_a_gpu_is_refused(prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer = TrainerConfig(max_steps=4, global_batch_size=8, micro_batch_size=2, device=Device.cuda)
    [message] = problems(good(prepared, trainer=trainer))
    assert message == "trainer.device=cuda: torch finds no CUDA GPU on this machine; set trainer.device=auto"


def test_a_mixture_by_weight_has_no_epochs(prepared: str) -> None:
    trainer = TrainerConfig(max_epochs=2, global_batch_size=8, micro_batch_size=2)
    parts = [MixtureSource(prepared, "one", weight=1), MixtureSource(prepared, "two", weight=2)]
    data = DataConfig(dir="", mixture=parts, sequence_length=32)
    (message,) = problems(good(prepared, data=data, trainer=trainer))
    assert "trainer.max_epochs=2: a mixture by weight has no end; give its sources token budgets" in message
    parts = [MixtureSource(prepared, "one", tokens=1), MixtureSource(prepared, "two", tokens=2)]
    data = DataConfig(dir="", mixture=parts, sequence_length=32)
    assert validate(good(prepared, data=data, trainer=trainer), world_size=2) == []


def test_experts_must_cut_evenly_over_the_ranks_that_share_them(prepared: str) -> None:
    # 12 ranks in groups of 4: 3 of them share the same experts, and 64 is no multiple of 3.
    cfg = good(
        prepared,
        model=ModelConfig(vocab_size=1024, eos_token_id=0, hidden_size=64, intermediate_size=48),
        trainer=TrainerConfig(max_steps=4, global_batch_size=24, micro_batch_size=2),
        parallel=ParallelConfig(expert_parallel_size=4),
    )
    (message,) = problems(cfg, world_size=12)
    assert "model.hidden_size=64 must be a multiple of the 3 ranks" in message


def test_all_mistakes_are_reported_at_once(prepared: str) -> None:
    cfg = good(
        prepared,
        model=ModelConfig(vocab_size=512, eos_token_id=0, num_attention_heads=7, num_experts_per_tok=65),
        trainer=TrainerConfig(max_steps=4, global_batch_size=7, micro_batch_size=2),
        optimizer=AdamWConfig(lr=0.0),
    )
    text = "\n".join(problems(cfg))
    for key in ("trainer.global_batch_size", "optimizer.lr", "num_attention_heads", "num_experts_per_tok"):
        assert key in text
    assert "model.vocab_size=512" in text


def test_options_without_effect_warn(prepared: str, tmp_path: Path) -> None:
    cfg = good(
        prepared,
        data=DataConfig(dir=prepared, sequence_length=32, source=SourceConfig(processes=3)),
        loss=LossConfig(router_aux_loss_coef=0),
        balancing=AuxiliaryLossConfig(scope=BalanceScope.micro_batch),
        optimizer=AdamWConfig(max_grad_norm=0),
        scheduler=SchedulerConfig(decay_fraction=0.1),
        model=dataclasses.replace(
            good(prepared).model, trust_pickle=True, strip_prefix=StripPrefix.auto, revision="v1"
        ),
    )
    write_prepared(tmp_path / "train_only", [[5] * 100])
    alone = DataConfig(dir=str(tmp_path), mixture=[MixtureSource("train_only", weight=1)], sequence_length=32)
    assert validate(good(prepared, data=alone), world_size=2) == [
        "data.mixture has only one source, so its weight has no effect",
        "data.mixture: train_only has no validation split, so it is not evaluated",
    ]
    warnings = "\n".join(validate(cfg, world_size=2))
    assert "data.source.processes has no effect here" in warnings
    assert "balancing.scope has no effect" in warnings
    assert "gradients are not clipped" in warnings
    assert "scheduler.decay_fraction has no effect: scheduler.kind is cosine" in warnings
    for name in ("revision", "trust_pickle", "strip_prefix"):
        assert f"model.{name} has no effect: model.init_from is null" in warnings


def test_options_of_gathering_without_effect_warn(prepared: str) -> None:
    changed: dict[str, Any] = {"reshard_after_forward": False, "prefetch": 2}
    for parallel, ranks, reason in (
        (ParallelConfig(strategy=Strategy.ddp, **changed), 2, "parallel.strategy is ddp"),
        (ParallelConfig(replicate_size=2, **changed), 2, "each rank has a whole copy of the model"),
    ):
        warnings = validate(good(prepared, parallel=parallel), ranks)
        assert warnings == [f"parallel.{name} has no effect: {reason}" for name in changed]
    assert not validate(good(prepared, parallel=ParallelConfig(**changed)), world_size=2)
    told = problems(good(prepared, parallel=ParallelConfig(prefetch=-1)))
    assert told == ["parallel.prefetch=-1: must not be negative"]


def test_grouped_mm_is_refused_where_rows_are_no_whole_16_bytes() -> None:
    model = ModelConfig(intermediate_size=12, experts_backend=ExpertsBackend.grouped_mm)
    in_fp32 = TrainConfig(model=model, trainer=TrainerConfig(max_steps=1, precision=Precision.fp32))
    in_bf16 = TrainConfig(model=model, trainer=TrainerConfig(max_steps=1, precision=Precision.bf16))
    assert backend_errors(in_fp32) == []
    assert [message.split(":")[0] for message in backend_errors(in_bf16)] == ["model.intermediate_size=12"]


def test_sonicmoe_is_refused_where_it_cannot_run(prepared: str) -> None:
    sonic = ModelConfig(
        vocab_size=1024, eos_token_id=0, hidden_act="gelu", experts_backend=ExpertsBackend.sonicmoe
    )
    told = problems(good(prepared, model=sonic, parallel=ParallelConfig(expert_parallel_size=2)))
    for option in ("model.hidden_act=gelu", "parallel.expert_parallel_size=2"):
        assert any(
            f"model.experts_backend=sonicmoe with {option}: it supports only silu, in bf16" in each
            for each in told
        )
    assert told[-1].startswith("model.experts_backend=sonicmoe: ")  # what this machine lacks
    assert told[-1].endswith("; or set model.experts_backend=grouped_mm")


@pytest.mark.parametrize("verb", ["train", "prepare", "evaluate", "export", "generate"])
def test_every_option_is_documented(verb: str) -> None:
    schema = getattr(schemas, f"{verb.capitalize()}Config")
    rows = documented_keys(schema)
    assert [key for key, _, doc in rows if not doc] == []
    text = help_text(verb, schema)
    assert all(f"  {key} = {default}\n" in text for key, default, _ in rows)
    assert f"usage: olmoe {verb}" in text


@pytest.mark.slow
def test_commands_exit_with_2_and_leave_nothing(tmp_path: Path) -> None:
    result = olmoe("trian", cwd=tmp_path)
    assert result.returncode == 2
    assert "there are prepare" in result.stderr

    result = olmoe("train", "data.dir=x", "trainer.max_steps=3", "trainer.global_batch_size=7", cwd=tmp_path)
    assert result.returncode == 2
    assert "2 errors" in result.stderr
    assert "olmoe prepare" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.dir=x", "trainer.max_step=3"], "did you mean trainer.max_steps?"),
        (["data.dir=x", "+trainer.foo=3"], "there is no key 'foo', and + cannot add one"),
        (["trainer.max_steps=3"], "data.dir=..."),
        (["data.dir=x", "trainer.precision=fp8"], "expected one of [bf16, fp32]"),
        (["data.dir=x", "trainer.max_steps=many"], "could not be converted to Integer"),
        (["data.dir=x", "experiment=olmo"], "quickstart"),
    ],
)
def test_what_hydra_refuses_exits_with_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    reached: list[object] = []
    assert run_verb("train", TrainConfig, reached.append) == 2
    assert message in capsys.readouterr().err
    assert reached == []


def test_a_rank_names_itself_in_an_error_that_rank_0_does_not_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends the other ranks at once if rank 0 has it, too."""

    def main(cfg: TrainConfig) -> None:
        raise UserError("data.dir=x: there is none")

    monkeypatch.setattr(sys, "argv", ["train", "data.dir=x", "experiment=quickstart"])
    monkeypatch.setattr(app, "SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.setenv("RANK", "1")
    assert run_verb("train", TrainConfig, main) == 2
    place = f"rank 1 (host {socket.gethostname()}, process {os.getpid()})"
    assert capsys.readouterr().err == f"error: {place}: data.dir=x: there is none\n"


def test_a_good_command_line_reaches_the_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "data.dir=x", "experiment=quickstart", "trainer.max_steps=7"])
    reached: list[TrainConfig] = []
    assert run_verb("train", TrainConfig, reached.append) == 0
    assert (reached[0].trainer.max_steps, reached[0].run_dir) == (7, "runs/quickstart")


def test_hashes_are_verified_on_request(tmp_path: Path) -> None:
    directory = write_prepared(tmp_path / "data", [[5] * 100], [[6] * 100])
    shard = directory / "validation/shard-00000.npy"
    shard.write_bytes(b"\7" + shard.read_bytes()[1:])
    data = DataConfig(dir=str(directory), sequence_length=32)
    assert validate(good(str(directory), data=data), world_size=2) == []
    [problem] = problems(good(str(directory), data=dataclasses.replace(data, verify_hashes=True)))
    assert "validation/shard-00000.npy: its contents changed since it was prepared (hash)" in problem


def test_what_only_prepare_reads_has_no_effect(prepared: str) -> None:
    data = DataConfig(
        dir=prepared,
        sequence_length=32,
        source=SourceConfig(min_characters=3),
        olmo=OlmoFilesConfig(vocab_size=5),
    )
    warnings = validate(good(prepared, data=data), world_size=2)
    assert [warning.split(" ")[0] for warning in warnings] == ["data.source.min_characters", "data.olmo"]
