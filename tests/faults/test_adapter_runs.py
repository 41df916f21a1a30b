"""Runs that train an adapter: exact and elastic resume, the frozen base, and another base."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from olmoe_train.checkpoint.convert.export import write_adapter
from olmoe_train.checkpoint.convert.stored_model import load_stored_model, open_stored_model
from olmoe_train.config.adapter import DoraConfig, LoraConfig
from olmoe_train.config.choices import (
    ActivationCheckpointing,
    Precision,
    QuantizeBase,
    RouterTraining,
    Strategy,
    Weights,
)
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.merge import merged
from olmoe_train.training.engine.base import Engine
from olmoe_train.utils.errors import UserError
from tests.support.faults import (
    assert_same_end,
    change_engine,
    config,
    metrics,
    run,
    saved_weights,
    write_data,
)
from tests.support.hf_directories import edit_tensors
from tests.support.ranks import RankError, run_ranks
from tests.support.runs import PARTITION_ALL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data/, and the base model in base/."""
    directory = tmp_path_factory.mktemp("adapters")
    write_data(directory / "data")
    torch.manual_seed(1)
    cfg = config(directory / "data", directory)
    OlmoeForCausalLM(olmoe_config(cfg.model)).save_pretrained(directory / "base")
    return directory


@pytest.fixture(scope="module")
def adapter_config(parts: Path) -> Callable[..., TrainConfig]:
    def make(run_dir: Path, adapter: LoraConfig, **changes: Any) -> TrainConfig:
        cfg = config(parts / "data", run_dir, adapter=adapter, **changes)
        optimizer = AdamWConfig(lr=1e-2, eps=1e-5)  # see tests/support/runs.py
        return replace(cfg, model=replace(cfg.model, init_from=str(parts / "base")), optimizer=optimizer)

    return make


AdapterRun = Callable[..., TrainConfig]


def test_a_run_in_two_parts_is_the_run_in_one(
    adapter_config: AdapterRun, parts: Path, tmp_path: Path
) -> None:
    """With dropout on the experts' inputs, and a recomputation that has to drop the same elements."""
    base = (parts / "base/model.safetensors").read_bytes()
    adapter = DoraConfig(rank=3, alpha=12.0, dropout=0.3)
    trainer = {"activation_checkpointing": ActivationCheckpointing.full}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_ranks(2, run, adapter_config(whole, adapter, trainer=trainer))
    for end in (3, 6):
        run_ranks(2, run, adapter_config(halves, adapter, trainer=trainer | {"stop_at_step": end}))
    assert_same_end(halves, whole)
    assert (parts / "base/model.safetensors").read_bytes() == base
    tensors = saved_weights(whole, 6)
    assert {name.rpartition("_")[2] for name in tensors if "lora" in name} == {"A", "B"}
    assert len(tensors) == 2 * (4 + 2) * 3  # per layer 4 projections and 2 stacks: A, B and magnitude
    for name, tensor in tensors.items():
        # Every row of every expert on every rank was trained and saved.
        assert tensor.abs().amax(-1).gt(0).all(), name
    assert metrics(whole)[0]["train/loss"] == metrics(whole)[0]["train/ce_loss"]  # frozen routers


def test_other_layouts_continue_an_adapter(adapter_config: AdapterRun, tmp_path: Path) -> None:
    adapter = LoraConfig(rank=4, alpha=12.0)
    run_ranks(2, run, adapter_config(tmp_path / "whole", adapter))
    expected = saved_weights(tmp_path / "whole", 6)
    layouts = [
        (1, ParallelConfig(strategy=Strategy.ddp)),
        (
            2,
            ParallelConfig(
                strategy=Strategy.deepspeed,
                zero_stage=3,
                expert_parallel_size=2,
                deepspeed_config=str(PARTITION_ALL),
            ),
        ),
    ]
    for index, (ranks, parallel) in enumerate(layouts):
        run_dir = tmp_path / str(index)
        run_ranks(2, run, adapter_config(run_dir, adapter, trainer={"stop_at_step": 3}))
        run_ranks(ranks, run, adapter_config(run_dir, adapter, parallel=parallel))
        found = saved_weights(run_dir, 6)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert (tensor - expected[name]).norm() < 1e-5 * expected[name].norm(), (parallel, name)


def test_another_base_is_refused(adapter_config: AdapterRun, parts: Path, tmp_path: Path) -> None:
    cfg = adapter_config(tmp_path / "run", LoraConfig(rank=2, alpha=3.0), trainer={"stop_at_step": 2})
    run_ranks(1, run, replace(cfg, parallel=ParallelConfig()))
    stored = open_stored_model(cfg.run_dir)
    assert stored.adapter is not None
    name = "model.layers.1.mlp.experts.gate_up_proj"
    base = OlmoeForCausalLM.from_pretrained(parts / "base").get_parameter(name).detach()
    names, adapter = set(stored.adapter.names), stored.adapter
    assert torch.equal(stored.read(name), merged(name, base, names, adapter.read, adapter.spec))
    assert not torch.equal(stored.read(name), base)
    model, _ = load_stored_model(cfg.run_dir, CPU)
    assert torch.equal(model.get_parameter(name), stored.read(name))

    moved = tmp_path / "moved"
    (parts / "base").rename(moved)  # the path does not matter, the weights do
    try:
        with pytest.raises(UserError, match=r"its base model is not at .*base: bring it back, or set"):
            open_stored_model(cfg.run_dir)
        cfg = replace(cfg, parallel=ParallelConfig(), model=replace(cfg.model, init_from=str(moved)))
        run_ranks(1, run, replace(cfg, trainer=replace(cfg.trainer, stop_at_step=3)))
        assert open_stored_model(cfg.run_dir).adapter is not None
        copy = shutil.copytree(moved, tmp_path / "copy")
        edit_tensors(moved, lambda tensors: tensors["lm_head.weight"][0].add_(1e-3))
        with pytest.raises(RankError, match="holds an adapter of other weights than those of"):
            run_ranks(1, run, replace(cfg, trainer=replace(cfg.trainer, stop_at_step=4)))
        with pytest.raises(UserError, match="has other weights than the base that the adapter was trained"):
            open_stored_model(cfg.run_dir)
        # The fix that the message names: config.yaml counts, although the checkpoint's path exists, too.
        path = Path(cfg.run_dir) / "config.yaml"
        path.write_text(path.read_text().replace(str(moved), str(copy)))
        assert open_stored_model(cfg.run_dir).adapter is not None
    finally:
        moved.rename(parts / "base")


def test_a_peft_export_is_written_once(adapter_config: AdapterRun, tmp_path: Path) -> None:
    # 8 / 49 * 49 is not 8 in floating point.
    adapter = LoraConfig(rank=49, alpha=8.0, router=RouterTraining.full)
    trainer = {"max_steps": 2, "ema_decay": 0.5}
    cfg = adapter_config(tmp_path / "run", adapter, parallel=ParallelConfig(), trainer=trainer)
    run_ranks(1, run, cfg)
    first, average = (open_stored_model(cfg.run_dir, step, which=Weights.ema).adapter for step in "12")
    assert first is not None
    assert average is not None
    for name, weight in saved_weights(cfg.run_dir, 2).items():
        assert torch.allclose(average.read(name), (first.read(name) + weight) / 2, atol=1e-7), name
    out = tmp_path / "out"
    assert write_adapter(open_stored_model(cfg.run_dir), out)
    assert not write_adapter(open_stored_model(cfg.run_dir), out)
    with pytest.raises(UserError, match="is not empty, and does not hold this adapter: choose another"):
        write_adapter(open_stored_model(cfg.run_dir, "1"), out)


def assert_fp32_scales(engine: Engine) -> None:
    scales = [buffer for name, buffer in engine.model.named_buffers() if name.endswith("absmax")]
    assert len(scales) == 2 * (4 + 2)
    assert {scale.dtype for scale in scales} == {torch.float32}


def test_deepspeed_in_bf16_keeps_the_scales_of_a_quantized_base(
    adapter_config: AdapterRun, tmp_path: Path
) -> None:
    """In bf16 the base would be another one than that of an export, and of every other strategy."""
    adapter = LoraConfig(rank=4, alpha=12.0, quantize_base=QuantizeBase.nf4)
    parallel = ParallelConfig(strategy=Strategy.deepspeed, zero_stage=2)
    trainer = {"precision": Precision.bf16, "max_steps": 1}
    cfg = adapter_config(tmp_path / "run", adapter, parallel=parallel, trainer=trainer)
    run_ranks(1, run, cfg, partial(change_engine, assert_fp32_scales))
