"""Runs that start from a PEFT adapter: every layout starts from the same loss, that of the merged model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from olmoe_train.checkpoint.convert.stored_model import load_stored_model
from olmoe_train.config.adapter import LoraConfig
from olmoe_train.config.choices import AdapterTarget, RouterTraining
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter
from olmoe_train.model.adapters.merge import merged
from olmoe_train.model.adapters.peft_write import write_peft
from olmoe_train.model.adapters.spec import TARGETS, AdapterSpec
from olmoe_train.train import train
from tests.support.data import write_prepared
from tests.support.faults import metrics
from tests.support.ranks import run_ranks
from tests.support.runs import TINY, Layout, compose, real_tokens

LAYOUTS = {
    "fsdp 2, experts 2": Layout(2, 8, experts=2),
    "ddp 2": Layout(2, 8, "ddp"),
    "zero-3 2, experts 2": Layout(2, 8, "deepspeed", experts=2, zero_stage=3),
}


def train_each(configs: list[TrainConfig]) -> None:
    for cfg in configs:
        train(cfg)


def test_every_layout_starts_from_the_adapter(tmp_path: Path) -> None:
    write_prepared(tmp_path / "data", real_tokens(), real_tokens()[:1], vocab_size=258)
    tiny = compose(TINY | {"data.dir": tmp_path / "data"})
    torch.manual_seed(0)
    model = OlmoeForCausalLM(olmoe_config(tiny.model))
    model.save_pretrained(tmp_path / "base")
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    spec = AdapterSpec(rank=4, alpha=10.0, targets=TARGETS, trains_router=True)
    add_adapter(model, spec)
    tensors = {n: 0.1 * torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    write_peft(tmp_path / "adapter", spec, tensors, tensors.__getitem__, "base")

    whole = OlmoeForCausalLM(olmoe_config(tiny.model))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            weight = tensors.get(name, base[name])
            parameter.copy_(merged(name, weight, set(tensors), tensors.__getitem__, spec))
    whole.save_pretrained(tmp_path / "merged")

    # No update is as large as the last bit of a weight: what a run saves is what it started from.
    still = replace(
        tiny, trainer=replace(tiny.trainer, max_steps=1), optimizer=replace(tiny.optimizer, lr=1e-30)
    )
    adapter = LoraConfig(rank=4, alpha=10.0, targets=list(AdapterTarget), router=RouterTraining.full)
    configs = []
    for name, layout in LAYOUTS.items():
        cfg = layout.config(still, tmp_path / name)
        model_cfg = replace(
            cfg.model, init_from=str(tmp_path / "base"), adapter_from=str(tmp_path / "adapter")
        )
        configs.append(replace(cfg, adapter=adapter, model=model_cfg))
    run_ranks(2, train_each, configs, timeout=200)
    reference = Layout(1, 16).config(still, tmp_path / "reference")
    reference = replace(reference, model=replace(reference.model, init_from=str(tmp_path / "merged")))
    run_ranks(1, train_each, [reference])
    expected = metrics(tmp_path / "reference")[0]
    for name in LAYOUTS:
        found = metrics(tmp_path / name)[0]
        for key in ("train/ce_loss", "train/load_balancing_loss", "train/router_z_loss"):
            assert found[key] == pytest.approx(expected[key], rel=2e-5), (name, key)
        loaded, _ = load_stored_model(str(tmp_path / name), torch.device("cpu"))
        for parameter_name, parameter in whole.named_parameters():
            assert torch.equal(loaded.get_parameter(parameter_name), parameter), (name, parameter_name)
