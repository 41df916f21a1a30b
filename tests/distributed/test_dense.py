"""The dense comparator: one expert that takes every token, in the same loop as the mixtures."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from olmoe_train.config.train import LossConfig, TrainConfig
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.train import train
from tests.support.data import write_prepared
from tests.support.faults import records
from tests.support.ranks import run_ranks
from tests.support.runs import TINY, Layout, compose, real_tokens
from tests.support.tiny import build

DENSE = {"model.num_experts": 1, "model.num_experts_per_tok": 1, "model.intermediate_size": 32}
LAYOUTS = {
    "whole": Layout(1, 16),
    "micro-batches": Layout(1, 4),
    "fsdp": Layout(2, 4),
    "ddp": Layout(2, 8, strategy="ddp"),
    "zero-3": Layout(2, 4, strategy="deepspeed", zero_stage=3),
}


@pytest.mark.parametrize("normalised", [False, True])
def test_one_expert_is_a_plain_mlp(normalised: bool) -> None:
    config = OlmoeConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_experts=1,
                         num_experts_per_tok=1, norm_topk_prob=normalised)  # fmt: skip
    torch.manual_seed(0)
    block = OlmoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 16)
    gate, up = (x @ block.experts.gate_up_proj[0].T).chunk(2, -1)
    expected = (F.silu(gate) * up) @ block.experts.down_proj[0].T
    out = block(x)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    out.sum().backward()
    assert block.gate.weight.grad is not None  # FSDP and DDP wait for every parameter's
    assert block.gate.weight.grad.abs().max() == 0


def train_and_read(configs: list[TrainConfig]) -> list[list[dict[str, Any]]]:
    runs = []
    for cfg in configs:
        train(cfg)
        runs.append(records(cfg.run_dir))
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    home = tmp_path_factory.mktemp("dense")
    write_prepared(home / "data", real_tokens(), real_tokens()[:1], vocab_size=258)
    tiny = compose(TINY | DENSE | {"data.dir": home / "data", "trainer.max_steps": 4})
    configs = {name: layout.config(tiny, home / name) for name, layout in LAYOUTS.items()}
    configs["without weights"] = replace(
        configs["whole"], run_dir=str(home / "without"), loss=LossConfig(0.0, 0.0)
    )
    results: dict[str, list[dict[str, Any]]] = {}
    for ranks in (1, 2):
        there = {
            name: cfg for name, cfg in configs.items() if LAYOUTS.get(name, LAYOUTS["whole"]).ranks == ranks
        }
        results |= zip(there, run_ranks(ranks, train_and_read, list(there.values()))[0], strict=True)
    results["log"] = [{"text": (home / "whole" / "log.txt").read_text()}]
    return results


@pytest.mark.parametrize("name", [*LAYOUTS, "without weights"])
def test_the_loss_is_the_cross_entropy_in_every_layout(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    steps, expected = ([r for r in runs[run] if "train/loss" in r] for run in (name, "whole"))
    assert len(steps) == 4
    for line, reference in zip(steps, expected, strict=True):
        assert line["train/loss"] == line["train/ce_loss"] == pytest.approx(reference["train/loss"], rel=2e-5)
        assert line["train/grad_norm"] == pytest.approx(reference["train/grad_norm"], rel=1e-4)
        assert line["train/load_balancing_loss"] == pytest.approx(1.0, rel=1e-6)
        assert (line["router/max_violation"], line["router/entropy"], line["router/dead_experts"]) == (
            0,
            0,
            0,
        )
        assert line["router/layer_00/load"] == [1.0]
    final, reference = ([r for r in runs[run] if "eval/validation/loss" in r][-1] for run in (name, "whole"))
    assert final["eval/validation/loss"] == pytest.approx(reference["eval/validation/loss"], rel=2e-5)


def test_what_has_no_effect_is_said_and_nothing_is_said_of_dead_experts(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    log = runs["log"][0]["text"]
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        assert f"loss.{name} has no effect: a dense model (model.num_experts=1)" in log
    assert "dead" not in log.lower()
    assert "experts have had" not in log


def held_elements() -> int:
    model, _ = build(num_experts=1, num_experts_per_tok=1)
    experts = model.decoder_layers[0].mlp.experts
    return sum(local_tensor(parameter).numel() for parameter in experts.parameters())


def test_a_lone_expert_is_spread_over_the_ranks() -> None:
    assert run_ranks(4, held_elements) == [3 * 32 * 16 // 4] * 4
