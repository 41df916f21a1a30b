"""The bias of balancing=loss_free: saved, resumed in the same and in another layout, and used by whatever
reads the run; and scopes that depend on the layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import load_into, load_whole, open_stored_model
from olmoe_train.cli.export import main as export
from olmoe_train.cli.merge import main as merge
from olmoe_train.config.balancing import AuxiliaryLossConfig, LossFreeConfig
from olmoe_train.config.choices import BalanceScope, BiasExport, Strategy
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.config.verbs import ExportConfig, MergeConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.loss_free import LossFreeBias
from olmoe_train.train import train
from olmoe_train.training.engine.base import Engine
from olmoe_train.utils.errors import UserError
from tests.support.faults import (
    change_engine,
    config,
    metrics,
    same,
    saved_tensors,
    saved_weights,
    write_data,
)
from tests.support.ranks import run_ranks

RATE = 0.05
CPU = torch.device("cpu")


def train_each(cfgs: list[TrainConfig]) -> list[Tensor | str]:
    """On a rank: the bias after each run, or why there was none."""
    engines: list[Engine] = []
    change_engine(engines.append)
    found: list[Tensor | str] = []
    for cfg in cfgs:
        try:
            train(cfg)
            balancer: object = engines[-1].model.balancer
            found.append(balancer.bias.clone() if isinstance(balancer, LossFreeBias) else "")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.ranks
def test_a_bias_is_resumed_in_any_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data")
    loss_free = LossFreeConfig(bias_update_rate=RATE, router_temperature=2.0)
    zero = ParallelConfig(strategy=Strategy.deepspeed, zero_stage=2, expert_parallel_size=2)
    steps: dict[str, Any] = {"trainer": {"max_steps": 4}, "checkpoint": {"every": 2}}
    whole = config(data, tmp_path / "whole", balancing=loss_free, **steps)
    stopped = replace(whole, run_dir=str(tmp_path / "parts"), trainer=replace(whole.trainer, stop_at_step=2))
    elastic = replace(stopped, run_dir=str(tmp_path / "elastic"))
    running = config(
        *(data, tmp_path / "running"),
        balancing=AuxiliaryLossConfig(scope=BalanceScope.running),
        trainer={"max_steps": 2, "stop_at_step": 1, "micro_batch_size": 1},
    )
    cfgs = [
        *(whole, stopped, replace(whole, run_dir=stopped.run_dir)),
        *(elastic, replace(whole, run_dir=elastic.run_dir, parallel=zero)),
        *(running, replace(running, trainer=replace(whole.trainer, max_steps=2))),
    ]
    found, of_rank_1 = run_ranks(2, train_each, cfgs, timeout=300)
    at_end, half, resumed, _, by_zero, _, refused = found
    for mine, theirs in zip(found[:5], of_rank_1[:5], strict=True):
        assert torch.equal(mine, theirs)
    assert 0 < half.abs().max() <= 2 * RATE + 1e-6  # each step adds -rate, 0 or rate to each bias
    assert not torch.equal(at_end, half)
    assert torch.equal(at_end, resumed)
    assert same(saved_tensors(tmp_path / "whole", 4), saved_tensors(tmp_path / "parts", 4))
    torch.testing.assert_close(by_zero, at_end)
    assert "balancing (sequences of one pass): 1 on each of 2 ranks in the checkpoint, None now" in refused

    logged = metrics(whole.run_dir)[-1]
    z_loss = whole.loss.router_z_loss_coef * logged["train/router_z_loss"]
    assert logged["train/loss"] == pytest.approx(logged["train/ce_loss"] + z_loss)
    assert logged["train/load_balancing_loss"] >= 0.99
    check_readers(tmp_path, at_end, capsys)


def check_readers(tmp_path: Path, bias_LE: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    """Models read from the run have its bias and its temperature, or are refused."""
    stored = open_stored_model(tmp_path / "whole")
    model, gate = load_whole(stored, CPU), "model.layers.0.mlp.gate.weight"
    router = model.decoder_layers[0].mlp.gate
    probs_TE = torch.rand(5, stored.config.num_experts)
    assert torch.equal(router.scores(probs_TE), probs_TE + bias_LE[0])
    assert torch.equal(router.weight * 2, saved_weights(tmp_path / "whole", 4)[gate])
    with pytest.raises(UserError, match=r"no place for balancer\.bias_LE"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="this run has no such bias: set balancing=loss_free"):
        load_into(OlmoeForCausalLM(stored.config), tmp_path / "whole")
    load_into(model, tmp_path / "parts")

    out, run_dir = tmp_path / "hf", str(tmp_path / "whole")
    with pytest.raises(UserError, match="format=hf has no parameter for it"):
        export(ExportConfig(source=run_dir, out=str(out)))
    export(ExportConfig(source=run_dir, out=str(out), fold=BiasExport.drop))
    assert "fold=drop: the validation loss is " in capsys.readouterr().out
    assert torch.equal(open_stored_model(out).read(gate), router.weight)
    with pytest.raises(UserError, match="a mean of models has no place for it"):
        merge(MergeConfig(sources=[str(out), run_dir], out=str(tmp_path / "mean")))
