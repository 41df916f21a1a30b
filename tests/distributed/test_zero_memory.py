"""What `olmoe plan` says of DeepSpeed's state, against every tensor that real engines hold."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from olmoe_train.config.adapter import LoraConfig, NoAdapterConfig
from olmoe_train.config.choices import (
    ActivationCheckpointing,
    AdapterTarget,
    Offload,
    Precision,
    QuantizeBase,
    Strategy,
)
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.config.optimizer import ADAMW_STATE
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.distributed.mesh import build_mesh, init_distributed, local_tensor
from olmoe_train.optim.build import trained_parameters
from olmoe_train.planning.adapter import adapter_plan
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.memory import MicroBatch
from olmoe_train.planning.memory_deepspeed import deepspeed_memory, host_memory, save_memory
from olmoe_train.training.build import build_model
from olmoe_train.training.engine.deepspeed import ZeroEngine
from tests.support.ranks import run_ranks

RANKS = 2
# 2.1 million parameters, a third of them experts'.
MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
)
ADAPTER = LoraConfig(rank=16, targets=[AdapterTarget.attention, AdapterTarget.experts])
# No buckets, and nothing gathered between micro-batches: the state alone.
LEAN = {
    "reduce_bucket_size": 1000,
    "allgather_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
LAYOUTS = {
    f"zero-{stage}, experts {experts}, {precision.value}, {offload.value}, {adapter.name}": (
        ParallelConfig(Strategy.deepspeed, experts, zero_stage=stage, offload=offload),
        precision,
        adapter,
    )
    for stage, experts, precision, offload, adapter in [
        (0, 2, Precision.fp32, Offload.none, NoAdapterConfig()),
        (1, 1, Precision.fp32, Offload.none, NoAdapterConfig()),
        (1, 2, Precision.bf16, Offload.none, NoAdapterConfig()),
        (2, 1, Precision.bf16, Offload.none, NoAdapterConfig()),
        (2, 2, Precision.fp32, Offload.none, NoAdapterConfig()),
        (2, 2, Precision.fp32, Offload.optimizer, NoAdapterConfig()),
        (3, 1, Precision.bf16, Offload.none, NoAdapterConfig()),
        (3, 2, Precision.fp32, Offload.none, NoAdapterConfig()),
        (3, 1, Precision.bf16, Offload.optimizer, NoAdapterConfig()),
        (3, 2, Precision.bf16, Offload.parameters, NoAdapterConfig()),
        (1, 2, Precision.bf16, Offload.none, ADAPTER),
        (2, 2, Precision.fp32, Offload.none, replace(ADAPTER, quantize_base=QuantizeBase.nf4)),
        (3, 1, Precision.bf16, Offload.none, ADAPTER),
    ]
}


def held() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta and type(thing).__name__ != "DTensor":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(directory: Path) -> dict[str, int]:
    """Bytes by layout, between two micro-batches of the second step."""
    found, engines = {}, []
    lean = directory / "lean.json"
    lean.write_text(json.dumps({"zero_optimization": LEAN}))
    for name, (parallel, precision, adapter) in LAYOUTS.items():
        cfg = TrainConfig(
            run_dir=str(directory),
            model=MODEL,
            data=DataConfig(dir="none", sequence_length=16),
            trainer=TrainerConfig(max_steps=9, global_batch_size=4, micro_batch_size=1, precision=precision),
            parallel=replace(parallel, deepspeed_config=str(lean)),
            adapter=adapter,
        )
        before = held()
        model = build_model(cfg, build_mesh(cfg.parallel, init_distributed("cpu")))
        engine = ZeroEngine(
            model, torch.device("cpu"), Path(cfg.run_dir), cfg.trainer, cfg.parallel, cfg.optimizer
        )
        del model
        ids = torch.randint(2, 2048, (1, 16))
        for micro_batch in range(3):
            loss = engine.model.training_forward(ids, ids).ce_sum
            engine.backward(loss, last=micro_batch == 1)
            if micro_batch == 1:
                engine.step(torch.isnan)
        found[name] = held() - before
        saved, adamw = engine.state()
        trained = trained_parameters(saved)
        tensors = [*trained, *(adamw.state[p][key] for p in trained for key in ADAMW_STATE)]
        found[f"save of {name}"] = sum(local_tensor(tensor).nbytes for tensor in tensors)
        del saved, adamw, trained, tensors
        engines.append(engine)  # not everything goes with it: the next one is measured beside it
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return run_ranks(RANKS, measure, tmp_path_factory.mktemp("memory"), timeout=300)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_is_what_the_plan_says(measured: dict[str, int], name: str) -> None:
    parallel, precision, cfg = LAYOUTS[name]
    adapter = adapter_plan(cfg)
    layout = ParallelLayout(
        parallel.strategy, RANKS, parallel.expert_parallel_size, 1, parallel.zero_stage, parallel.offload
    )
    batch = MicroBatch(1, 16, precision, ActivationCheckpointing.none)
    config = olmoe_config(MODEL)
    planned = deepspeed_memory(config, layout, batch, adapter).state + host_memory(
        config, layout, batch, adapter
    )
    assert planned == pytest.approx(measured[name], rel=0.001)
    assert save_memory(config, layout, adapter) == measured[f"save of {name}"]
