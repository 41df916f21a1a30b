"""What is frozen, in the memory of every rank: the same bits after training as before. It is the base of an
adapter, or what trainer.train_only does not name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import open_stored_model
from olmoe_train.config.choices import Weights
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.train import train
from olmoe_train.training.engine.base import Engine
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared
from tests.support.faults import change_engine, metrics, saved_weights
from tests.support.ranks import run_ranks
from tests.support.runs import TINY, Layout, compose, real_tokens
from tests.support.tiny import whole

LAYOUTS = {
    "fsdp": Layout(2, 8, experts=2, precision="bf16", adapter="lora"),
    "ddp": Layout(2, 8, "ddp", experts=2, adapter="dora"),
    "nf4": Layout(2, 8, experts=2, adapter="nf4", checkpointing="selective"),
    "nf4 compiled": Layout(2, 8, adapter="nf4", compiled=True),
    "zero-2": Layout(2, 4, "deepspeed", experts=2, zero_stage=2, precision="bf16", adapter="lora"),
}
TRAIN_ONLY = {
    "experts of fsdp": Layout(2, 4, experts=2, checkpointing="full"),
    "experts of ddp": Layout(2, 8, "ddp", precision="bf16"),
}
SELECTED = {1: [1, 6], 2: [5]}  # none in layer 0; with expert parallelism none in layer 2 on rank 0


def frozen_experts(layer: int) -> list[int]:
    """The experts of a layer that SELECTED does not name."""
    return [expert for expert in range(8) if expert not in SELECTED[layer]]


def frozen(model: OlmoeForCausalLM) -> dict[str, Tensor]:
    """Every frozen weight of this rank, every buffer of quantized ones, and the frozen experts of layers with
    trained ones, as copies."""
    parameters = {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}
    if model.adapter is None:
        for layer in SELECTED:
            for name, weight in model.decoder_layers[layer].mlp.experts.named_parameters():
                parameters[f"{layer}.{name}"] = whole(weight)[frozen_experts(layer)]
    return parameters | {name: buffer.clone() for name, buffer in model.named_buffers()}


def train_and_compare(configs: dict[str, TrainConfig]) -> dict[str, int]:
    """The number of frozen tensors of each layout; fails where one has changed."""
    engines: list[Engine] = []
    before: list[dict[str, Tensor]] = []

    def keep(engine: Engine) -> None:
        engines.append(engine)
        before.append(frozen(engine.model))

    change_engine(keep)
    counts = {}
    for name, cfg in configs.items():
        train(cfg)
        after = frozen(engines[-1].model)
        assert after.keys() == before[-1].keys(), name
        for tensor_name, tensor in after.items():
            assert torch.equal(tensor, before[-1][tensor_name]), (name, tensor_name)
        assert all(p.grad is None for p in engines[-1].model.parameters() if not p.requires_grad), name
        counts[name] = len(after)
        dist.barrier()
    return counts


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_what_is_frozen_keeps_its_bits(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", real_tokens(), real_tokens()[:1], vocab_size=258)
    tiny = compose(TINY | {"data.dir": tmp_path / "data"})
    tiny = replace(tiny, trainer=replace(tiny.trainer, max_steps=2))
    torch.manual_seed(0)
    OlmoeForCausalLM(olmoe_config(tiny.model)).save_pretrained(tmp_path / "base")
    (tmp_path / "experts.yaml").write_text(f"layers: {SELECTED}")
    only = replace(
        tiny,
        trainer=replace(tiny.trainer, train_only=str(tmp_path / "experts.yaml"), ema_decay=0.5),
        optimizer=replace(tiny.optimizer, weight_decay=0.0),
        model=replace(tiny.model, init_from=str(tmp_path / "base")),
    )
    configs = {
        name: layout.config(tiny, tmp_path / name, tmp_path / "base") for name, layout in LAYOUTS.items()
    } | {name: layout.config(only, tmp_path / name) for name, layout in TRAIN_ONLY.items()}
    counts = run_ranks(2, train_and_compare, configs, timeout=300)[0]
    # Of 3 layers: 4 projections, 2 stacks, 4 norms and the router; the embedding, the norm and the head.
    assert counts["ddp"] == 3 * (4 + 2 + 4 + 1) + 3
    assert counts["fsdp"] == counts["zero-2"] == 3 * (4 + 2 + 4) + 3  # the routers are trained
    assert counts["nf4"] == 3 * (2 * (4 + 2) + 4 + 1) + 3  # packed and absmax
    assert counts["experts of fsdp"] == 3 * (4 + 2 + 4 + 1) + 3
    compare_with_one_process(only, tmp_path)


def compare_with_one_process(only: TrainConfig, root: Path) -> None:
    """The runs of TRAIN_ONLY: their checkpoints hold whole models, trained as on one rank."""
    train(Layout(1, 16).config(only, root / "one"))
    base = {
        name: p.detach() for name, p in OlmoeForCausalLM.from_pretrained(root / "base").named_parameters()
    }
    for name in ("one", *TRAIN_ONLY):
        saved = saved_weights(root / name)
        assert saved.keys() == base.keys()
        average = open_stored_model(root / name, which=Weights.ema)
        for parameter, before in base.items():
            layer = int(parameter.split(".")[2]) if ".experts." in parameter else -1
            experts = frozen_experts(layer) if layer in SELECTED else slice(None)
            assert torch.equal(saved[parameter][experts], before[experts]), (name, parameter)
            assert torch.equal(average.read(parameter)[experts], before[experts]), (name, parameter)
            for expert in SELECTED.get(layer, []):
                moved = saved[parameter][expert] - before[expert]
                assert moved.norm() > 1e-3 * before[expert].norm(), (name, parameter, expert)
                moved_average = average.read(parameter)[expert] - before[expert]
                assert 0 < moved_average.norm() < moved.norm(), (name, parameter, expert)
    expected, found = saved_weights(root / "one"), saved_weights(root / "experts of fsdp")
    for parameter, weight in expected.items():
        assert (found[parameter] - weight).norm() <= 1e-5 * weight.norm(), parameter
    for step, reference in zip(metrics(root / "experts of fsdp"), metrics(root / "one"), strict=True):
        assert step["train/grad_norm"] == pytest.approx(reference["train/grad_norm"], rel=1e-4)
        assert step["train/ce_loss"] == pytest.approx(reference["train/ce_loss"], rel=2e-5)
        assert reference["train/grad_norm"] > TINY["optimizer.max_grad_norm"]  # clipping is at work
    (root / "experts.yaml").write_text("layers: {1: [1, 6], 2: [4]}")
    with pytest.raises(UserError, match=r"trains other weights: .* names .*'2': \[5\].*'2': \[4\]"):
        train(replace(Layout(1, 16).config(only, root / "one"), trainer=replace(only.trainer, max_steps=3)))
