"""Losses that have no weight are logged as what they are."""

from dataclasses import replace
from pathlib import Path

import pytest

from olmoe_train.config.train import LossConfig, TrainConfig
from olmoe_train.train import train
from tests.support.data import write_prepared
from tests.support.faults import metrics
from tests.support.ranks import run_ranks
from tests.support.runs import TINY, Layout, compose, real_tokens

ROUTER_LOSSES = ("train/load_balancing_loss", "train/router_z_loss")


def logged(configs: list[TrainConfig]) -> list[list[dict[str, float]]]:
    runs = []
    for cfg in configs:
        train(cfg)
        runs.append(metrics(cfg.run_dir))
    return runs


def test_router_losses_without_weight_do_not_change_with_micro_batching(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", real_tokens(), real_tokens()[:1], vocab_size=258)
    tiny = compose(TINY | {"data.dir": tmp_path / "data", "trainer.max_steps": 4, "trainer.log_every": 2})
    tiny = replace(tiny, loss=LossConfig(router_aux_loss_coef=0.0, router_z_loss_coef=0.0))
    whole, cut = run_ranks(
        1, logged, [Layout(1, size).config(tiny, tmp_path / str(size)) for size in (16, 4)]
    )[0]
    assert [line["step"] for line in cut] == [2, 4]
    for line, expected in zip(cut, whole, strict=True):
        for name in ROUTER_LOSSES:
            assert line[name] == pytest.approx(expected[name], rel=2e-5)
        assert line["train/loss"] == line["train/ce_loss"] == pytest.approx(expected["train/loss"], rel=2e-5)
