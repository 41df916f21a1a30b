"""The base of an adapter in the memory of every rank: the same bits after training as before."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.train import train
from olmoe_train.training.engine.base import Engine
from tests.support.data import write_prepared
from tests.support.faults import change_engine
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


def frozen(model: OlmoeForCausalLM) -> dict[str, Tensor]:
    """Every frozen weight of this rank, and every buffer of quantized ones, as copies."""
    parameters = {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}
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


def test_the_base_keeps_its_bits(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", real_tokens(), real_tokens()[:1], vocab_size=258)
    tiny = compose(TINY | {"data.dir": tmp_path / "data"})
    tiny = replace(tiny, trainer=replace(tiny.trainer, max_steps=2))
    torch.manual_seed(0)
    OlmoeForCausalLM(olmoe_config(tiny.model)).save_pretrained(tmp_path / "base")
    configs = {
        name: layout.config(tiny, tmp_path / name, tmp_path / "base") for name, layout in LAYOUTS.items()
    }
    counts = run_ranks(2, train_and_compare, configs, timeout=300)[0]
    # Of 3 layers: 4 projections, 2 stacks, 4 norms and the router; the embedding, the norm and the head.
    assert counts["ddp"] == 3 * (4 + 2 + 4 + 1) + 3
    assert counts["fsdp"] == counts["zero-2"] == 3 * (4 + 2 + 4) + 3  # the routers are trained
    assert counts["nf4"] == 3 * (2 * (4 + 2) + 4 + 1) + 3  # packed and absmax
