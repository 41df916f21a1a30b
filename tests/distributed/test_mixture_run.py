"""A whole run on a mixture, and on stages: what metrics say, where it ends, what a resumed one refuses."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olmoe_train.config.choices import Device, Packing, Precision, WandbMode
from olmoe_train.config.data import DataConfig, DataStage, MixtureSource
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import (
    BatchSizeStage,
    EvaluationConfig,
    LoggingConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
)
from olmoe_train.data.loader import TrainSamples
from olmoe_train.train import train
from olmoe_train.utils.errors import UserError
from tests.support.data import add_loss_mask, write_prepared
from tests.support.faults import records
from tests.support.ranks import run_ranks

S = 32


def config(root: Path) -> TrainConfig:
    """Budgets of 100 and 60 sequences, of data that has 40 and 64: of those, 40 say the same thing over and
    over and 5 are never targets."""
    generator = np.random.default_rng(0)
    a = [generator.integers(2, 60, S - 1).tolist() for _ in range(40)]
    b = [[7] * (40 * S - 1), *(generator.integers(2, 60, S - 1).tolist() for _ in range(24))]
    write_prepared(root / "a", a, a[:3], vocab_size=64)
    write_prepared(root / "b", b, b[1:8], vocab_size=64)
    add_loss_mask(root / "b", "train", [1] * (59 * S) + [0] * (5 * S))
    return TrainConfig(
        run_dir=str(root / "run"),
        model=ModelConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            eos_token_id=0,
        ),
        data=DataConfig(
            dir=str(root),
            mixture=[MixtureSource("a", tokens=100 * S), MixtureSource("b", "bee", tokens=60 * S)],
            sequence_length=S,
            repetition_filter=True,
        ),
        trainer=TrainerConfig(
            max_epochs=0.3,
            global_batch_size=10,
            micro_batch_size=5,
            precision=Precision.fp32,
            device=Device.cpu,
            log_every=1,
        ),
        logging=LoggingConfig(wandb=WandbConfig(mode=WandbMode.disabled)),
        evaluation=EvaluationConfig(micro_batch_size=2),
    )


def run(cfg: TrainConfig) -> list[dict[str, Any]]:
    assert not train(cfg).stopped_by_signal
    return records(cfg.run_dir)


def with_nan(value: Any) -> Any:
    """A value with NaN for null, which pytest.approx compares; a loss without targets is null."""
    if isinstance(value, list):
        return [with_nan(one) for one in value]
    return math.nan if value is None else value


def refusal(cfg: TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        train(cfg)
    return str(caught.value)


def test_a_run_on_a_mixture(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    (straight,) = run_ranks(1, run, cfg)
    first, *steps, last = straight
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]  # 0.3 of 160 sequences, in batches of 10
    for row in (first, last):
        losses = [row[f"eval/{name}/loss"] for name in ("a", "bee", "validation")]
        # Of 3 and 7 sequences.
        assert losses[2] == pytest.approx(0.3 * losses[0] + 0.7 * losses[1])
    for row in steps:
        assert row["data/a/requested_share"] == 100 / 160
        assert row["data/a/share"] == pytest.approx(100 / 160, abs=2 / (10 * row["step"]))
        assert row["data/a/epochs"] == pytest.approx(row["data/a/share"] * 10 * row["step"] / 40)
        assert row["data/a/share"] + row["data/bee/share"] == 1
    samples = TrainSamples(cfg.data, cfg.seed)
    for row in steps:
        drawn = [samples[index] for index in range(10 * (row["step"] - 1), 10 * row["step"])]
        repetitive = sum(set(sample["input_ids"].tolist()) == {7} for sample in drawn)
        masked = sum(set(sample["targets"].tolist()) == {-100} for sample in drawn)
        assert row["data/repetitive_sequences"] == repetitive
        assert row["data/sequences_without_targets"] == masked
    assert sum(row["data/repetitive_sequences"] for row in steps) > 5
    assert steps[0].keys() >= {"data/bee/epochs", "data/bee/requested_share"}


def test_resumed_in_the_middle_it_is_the_same_run_and_another_mixture_is_refused(tmp_path: Path) -> None:
    """The second stage begins in the middle of step 3, inside of a micro-batch, after the resume on two
    ranks. It was another stage when the run began, which had not reached it. From step 3 on, a step has 20
    sequences in place of 10."""
    cfg = config(tmp_path)
    weights = [replace(one, weight=one.tokens, tokens=None) for one in cfg.data.mixture]
    first = DataStage(until_tokens=23 * S, mixture=weights)
    data = replace(cfg.data, mixture=[], stages=[first, DataStage(mixture=weights[1:])])
    warmup = [BatchSizeStage(until_tokens=15 * S, global_batch_size=10)]
    trainer = replace(
        cfg.trainer, max_epochs=None, max_tokens=60 * S, global_batch_size=20, batch_size_warmup=warmup
    )
    cfg = replace(cfg, data=data, trainer=trainer)
    (straight,) = run_ranks(1, run, cfg)
    *_, second, third, fourth, _ = straight
    assert [row["tokens"] for row in (second, third, fourth)] == [20 * S, 40 * S, 60 * S]
    assert fourth["step"] == 4
    samples = TrainSamples(data, cfg.seed)
    of_bee = [samples.place(index)[0] == 1 for index in range(60)]
    assert all(of_bee[23:])
    assert not all(of_bee[:23])
    assert [row["data/stage"] for row in (second, third, fourth)] == [1, 2, 2]
    assert third["data/bee/share"] == pytest.approx(sum(of_bee[:40]) / 40)
    assert third["data/bee/requested_share"] == pytest.approx((23 * 0.375 + 17) / 40)
    assert (third["data/bee/stage_share"], third["data/a/stage_share"]) == (1, 0)
    log = (tmp_path / "run/log.txt").read_text()
    achieved = sum(of_bee[:23]) / 23
    assert (
        f"step 3 | ended: stage 1 of 2, tokens 0 to {23 * S}: a {1 - achieved:.2%} (62.50% requested)" in log
    )

    unknown = replace(data, stages=[first, DataStage(dir="a")])
    stopped = replace(
        cfg,
        run_dir=str(tmp_path / "again"),
        trainer=replace(trainer, stop_at_step=2),
        data=unknown,
    )
    run_ranks(1, run, stopped)
    stopped = replace(stopped, data=data)
    a, b = weights
    heavier = replace(data, stages=[replace(first, mixture=[a, replace(b, weight=100 * S)]), data.stages[1]])
    (message,) = run_ranks(1, refusal, replace(stopped, data=heavier))
    assert "step-00000002 was made by a run that computes something else" in message
    assert "data (stages.1.mixture.bee.share): 0.375 in the checkpoint, 0.5 now" in message
    assert "train_sha256" not in message
    assert "stages.2" not in message
    (message,) = run_ranks(1, refusal, replace(stopped, trainer=replace(trainer, batch_size_warmup=[])))
    assert "trainer.batch_size_warmup[0].global_batch_size: 10 in the checkpoint, None now" in message
    assert message.endswith("checkpoint.allow_changes=[scheduler,trainer.batch_size_warmup]")
    packed = replace(data, packing=Packing.best_fit)
    (message,) = run_ranks(1, refusal, replace(stopped, data=packed))
    assert "data (packing): concat in the checkpoint, best_fit-v1 now" in message
    (resumed,) = run_ranks(2, run, replace(stopped, trainer=trainer))[:1]
    for found, expected in zip(resumed, straight, strict=True):
        assert found.keys() == expected.keys()
        for key in found:
            if key.startswith(("train/", "eval/", "data/")):
                value, same = (with_nan(record[key]) for record in (found, expected))
                assert value == pytest.approx(same, rel=1e-4, nan_ok=True), (found["step"], key)
