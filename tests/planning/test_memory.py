"""Memory that `olmoe plan` predicts: bytes by hand, against autograd's tensors and against real ranks."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from olmoe_train.cli.plan import is_valid
from olmoe_train.config.adapter import DoraConfig, LoraConfig
from olmoe_train.config.choices import (
    ActivationCheckpointing,
    AdapterTarget,
    ExpertsBackend,
    Precision,
    QuantizeBase,
    RouterTraining,
    Strategy,
)
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.optimizer import MuonConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.distributed.mesh import build_mesh, init_distributed, local_tensor
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import add_adapter, quantize_base
from olmoe_train.model.losses import router_losses_from_stats
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import parameter_groups
from olmoe_train.planning.adapter import adapter_plan
from olmoe_train.planning.layout import ParallelLayout, count_units
from olmoe_train.planning.live_memory import LiveBytes, held_bytes
from olmoe_train.planning.memory import MicroBatch, rank_memory, saved_activations
from olmoe_train.planning.report import plan_layout, plan_memory, plan_micro_batch, possible_layouts
from olmoe_train.planning.traffic import Links, step_traffic
from olmoe_train.training.batch import count_tokens
from olmoe_train.training.build import build_model
from olmoe_train.training.objectives.next_token import NextToken
from tests.support.plans import (
    DENSE,
    EXPERTS,
    OLMOE_1B_7B,
    ONE_SEQUENCE,
    ROOT,
    TOTAL,
    fsdp,
    plan_config,
)
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES

NONE, SELECTIVE, FULL = ActivationCheckpointing
# Large enough that what the plan leaves out is below 0.5%. No width is a multiple of another one.
SMALL: dict[str, Any] = SIZES | {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("layout", "parameters"),
    [
        (fsdp(1), TOTAL),
        (fsdp(8), TOTAL // 8),
        (fsdp(8, expert_parallel=4), TOTAL // 8),
        (fsdp(8, copies=2), TOTAL // 4),
        # Rows are not cut. Over 256 ranks embedding and head are 197 rows of 2048, not 196.5; a router is 1.
        (fsdp(256, expert_parallel=8), TOTAL // 256 + 2 * 1024 + 16 * (2048 - 512)),
        (ParallelLayout(Strategy.ddp, 8), TOTAL),
        (ParallelLayout(Strategy.ddp, 8, expert_parallel_size=8), TOTAL - 16 * EXPERTS * 7 // 8),
        # 64 experts are cut inside, too, where there are more ranks; and not where there are fewer.
        (fsdp(256), TOTAL // 256 + 2 * 1024 + 16 * (2048 - 512)),
        (fsdp(32), TOTAL // 32),
    ],
)
def test_state_of_the_released_model(layout: ParallelLayout, parameters: int) -> None:
    memory = rank_memory(OLMOE_1B_7B, layout, ONE_SEQUENCE)
    assert memory.parameters == memory.gradients == 4 * parameters
    assert memory.optimizer == 8 * parameters
    assert memory.state == 16 * parameters


def test_gathered_and_reduced_weights_of_the_released_model() -> None:
    layer = DENSE + EXPERTS
    memory = rank_memory(OLMOE_1B_7B, fsdp(8), ONE_SEQUENCE)
    assert memory.gathered == 2 * (ROOT + 2 * layer)
    assert memory.reduction == (2 + 4) * layer + 2 * 2048 * 50304
    alone = rank_memory(OLMOE_1B_7B, ParallelLayout(Strategy.ddp, 8), ONE_SEQUENCE)
    assert alone.gathered == 2 * TOTAL
    assert count_units(OLMOE_1B_7B, fsdp(256)).experts.gathered == EXPERTS
    assert count_units(OLMOE_1B_7B, fsdp(256, expert_parallel=2)).experts.gathered == EXPERTS // 2
    # 2048 is no multiple of 96: one expert on each of 64 ranks, padding on 32, which is gathered, too.
    assert count_units(OLMOE_1B_7B, fsdp(96)).experts.gathered == EXPERTS * 96 // 64


def test_gathered_weights_that_are_kept_or_asked_for_ahead() -> None:
    layer, every_layer = DENSE + EXPERTS, 16 * (DENSE + EXPERTS)
    for ahead, layers in ((0, 2 * layer), (1, 2 * layer), (3, 4 * layer), (99, every_layer)):
        memory = rank_memory(OLMOE_1B_7B, replace(fsdp(8), prefetch=ahead), ONE_SEQUENCE)
        assert memory.gathered == 2 * (ROOT + layers)
    kept = replace(fsdp(8), reshard_after_forward=False)
    assert rank_memory(OLMOE_1B_7B, kept, ONE_SEQUENCE).gathered == 2 * (ROOT + every_layer)
    once = step_traffic(OLMOE_1B_7B, kept, ONE_SEQUENCE, 1, Links()).all_gather.bytes_sent
    assert once == 2 * TOTAL * 7 // 8
    cfg = plan_config(parallel=ParallelConfig(reshard_after_forward=False, prefetch=3))
    assert plan_memory(cfg, plan_layout(cfg), ONE_SEQUENCE)[0] == rank_memory(
        OLMOE_1B_7B, replace(kept, prefetch=3), ONE_SEQUENCE
    )
    assert plan_layout(cfg) in possible_layouts(cfg, is_valid)


def layer_activations(batch: MicroBatch) -> int:
    """What one layer of the released model adds to the activations that autograd keeps."""
    two, one = (replace(OLMOE_1B_7B, num_hidden_layers=layers) for layers in (2, 1))
    return saved_activations(two, batch) - saved_activations(one, batch)


def test_activations_of_the_released_model() -> None:
    """Per token and layer: norms 4 x (6 x 2048 + 4), attention 2 x 5 x 2048 + 4 x 16, router 2 x 2048 +
    4 x 64 + 4 + 8 x (32 + 4), rows 8 x 2 x 2 x 1024; with EP 8 x 2 x 2 x 2048."""
    norms, attention, router, rows = 49_168, 20_544, 4_644, 32_768
    layer = 4096 * (norms + attention + router + rows)
    assert layer_activations(ONE_SEQUENCE) == layer
    assert layer_activations(replace(ONE_SEQUENCE, exchanged=True)) == layer + 4096 * 65_536
    # Layer input 2 x 2048, routing 8 x 4 x 8.
    full = replace(ONE_SEQUENCE, checkpointing=FULL)
    assert layer_activations(full) == 4096 * (4096 + 256)


@pytest.mark.parametrize("mode", ActivationCheckpointing)
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"num_key_value_heads": 2},
        {"clip_qkv": 1.0},
        {"norm_topk_prob": True},
        {"num_shared_experts": 2, "qk_norm": False},
        {"routing": "expert_choice", "norm": "nonparametric"},
    ],
    ids=["released", "grouped_query", "clip_qkv", "norm_topk_prob", "shared_experts", "expert_choice"],
)
def test_saved_activations_are_autograds(
    variant: dict[str, Any], precision: Precision, mode: ActivationCheckpointing
) -> None:
    """Every storage alive between forward and backward, parameters aside."""
    config = OlmoeConfig(**SMALL | variant)
    batch = MicroBatch(2, 64, precision, mode)
    model = OlmoeForCausalLM(config).to(torch.bfloat16 if precision is Precision.bf16 else torch.float32)
    model.set_experts_backend("grouped_mm")
    checkpoint_activations(model, mode)
    parameters = {parameter.untyped_storage() for parameter in model.parameters()}
    with LiveBytes() as live:
        ids = torch.randint(2, config.vocab_size, (2, 64))
        output = model.training_forward(ids, ids)
        losses = output.ce_sum + sum(router_losses_from_stats(output.router, config.num_experts_per_tok))
        held = sum(storage.nbytes() for storage in live.storages if storage not in parameters)
    assert losses.requires_grad
    # Left out: counters of rows, scalars and the like.
    assert saved_activations(config, batch) == pytest.approx(held, rel=0.005)


ADAPTERS = {
    "lora": LoraConfig(rank=8, targets=list(AdapterTarget), router=RouterTraining.full),
    "dora": DoraConfig(rank=8),
    "dropout": LoraConfig(rank=8, dropout=0.5),
    "nf4": LoraConfig(rank=8, quantize_base=QuantizeBase.nf4),
}


# Not nf4 in bf16: on a CPU the loop over quantized experts pads the rows, which the plan leaves out.
MEASURED = [pair for pair in product(ADAPTERS, Precision) if pair != ("nf4", Precision.bf16)]


@pytest.mark.parametrize("mode", ActivationCheckpointing)
@pytest.mark.parametrize(("name", "precision"), MEASURED)
def test_saved_activations_with_an_adapter_are_autograds(
    name: str, precision: Precision, mode: ActivationCheckpointing
) -> None:
    """Bytes per layer, three layers less two: the first layer's input has no gradient, and keeps less."""
    plan = adapter_plan(ADAPTERS[name])
    assert plan is not None
    batch = MicroBatch(2, 64, precision, mode)
    held, planned = [], []
    for layers in (2, 3):
        config = OlmoeConfig(**SMALL | {"num_hidden_layers": layers})
        model = OlmoeForCausalLM(config)
        add_adapter(model, plan.spec)
        if plan.quantized:
            quantize_base(model)
        model.to(precision.dtype)
        model.set_experts_backend("grouped_mm")
        checkpoint_activations(model, mode)
        before = {t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
        with LiveBytes() as live:
            ids = torch.randint(2, config.vocab_size, (2, 64))
            output = model.training_forward(ids, ids)
            losses = output.ce_sum + sum(router_losses_from_stats(output.router, config.num_experts_per_tok))
            held.append(sum(storage.nbytes() for storage in live.storages if storage not in before))
        assert losses.requires_grad
        planned.append(saved_activations(config, batch, plan))
    assert planned[1] - planned[0] == pytest.approx(held[1] - held[0], rel=0.01)


def test_load_factor_scales_what_the_experts_receive() -> None:
    layout = fsdp(8, expert_parallel=8)
    even, double = (
        rank_memory(OLMOE_1B_7B, layout, replace(ONE_SEQUENCE, load_factor=load)) for load in (1.0, 2.0)
    )
    rows = 4096 * 8
    assert even.all_to_all == 2 * 2048 * (rows + rows) + 16 * 16 * rows
    assert double.all_to_all == 2 * 2048 * (rows + 2 * rows) + 16 * 16 * 2 * rows
    assert double.activations - even.activations == 16 * rows * 2 * (2048 + 2 * 1024)
    assert double.state == even.state
    assert rank_memory(OLMOE_1B_7B, fsdp(8), ONE_SEQUENCE).all_to_all == 0


RANKS = 2


def real_config(
    strategy: Strategy, expert_parallel: int, mode: ActivationCheckpointing, **gathering: Any
) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(**SMALL, experts_backend=ExpertsBackend.grouped_mm),
        data=DataConfig(dir="none", sequence_length=64),
        trainer=TrainerConfig(
            max_steps=1, micro_batch_size=2, precision=Precision.fp32, activation_checkpointing=mode
        ),
        parallel=ParallelConfig(strategy=strategy, expert_parallel_size=expert_parallel, **gathering),
    )


def dense(cfg: TrainConfig) -> TrainConfig:
    return replace(cfg, model=replace(cfg.model, intermediate_size=120, num_experts=1, num_experts_per_tok=1))


def adapted(cfg: TrainConfig, name: str, precision: Precision = Precision.fp32) -> TrainConfig:
    """An adapter, without a base to load: only sizes matter."""
    return replace(cfg, adapter=ADAPTERS[name], trainer=replace(cfg.trainer, precision=precision))


REAL_CONFIGS = [
    real_config(Strategy.fsdp, 1, NONE),
    real_config(Strategy.fsdp, 2, SELECTIVE),
    real_config(Strategy.ddp, 1, FULL),
    real_config(Strategy.ddp, 2, NONE),
    dense(real_config(Strategy.fsdp, 1, NONE)),
    real_config(Strategy.fsdp, 1, SELECTIVE, reshard_after_forward=False),
    real_config(Strategy.fsdp, 1, SELECTIVE, prefetch=2),
    replace(real_config(Strategy.fsdp, 2, NONE), optimizer=MuonConfig()),
    adapted(real_config(Strategy.fsdp, 1, NONE), "lora"),
    adapted(real_config(Strategy.fsdp, 2, FULL), "dora"),
    adapted(real_config(Strategy.ddp, 2, NONE), "nf4"),
    adapted(real_config(Strategy.fsdp, 2, NONE), "nf4", Precision.bf16),
    adapted(real_config(Strategy.fsdp, 2, SELECTIVE), "lora", Precision.bf16),
]


def measure(cfg: TrainConfig) -> tuple[int, int, int, int, int]:
    """Bytes on this rank: parameters, gradients, moments, quantized weights, and the peak of the second of
    two steps."""
    device = init_distributed("cpu")
    torch.manual_seed(0)  # with expert parallelism, the peak depends on which tokens arrive at this rank
    model = build_model(cfg, build_mesh(cfg.parallel, device))
    if cfg.adapter.name != "none":
        with torch.no_grad():
            for parameter in (*model.parameters(), *model.buffers()):
                if parameter.is_floating_point():
                    local_tensor(parameter).normal_(std=0.05)
    optimizer = build_optimizer(parameter_groups(model, cfg.optimizer), cfg.optimizer)
    objective = NextToken(model, device)
    assert isinstance(model, FSDPModule)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for step in range(2):
            live.peak = 0
            batches = []
            for _ in range(2):
                ids = torch.randint(cfg.model.vocab_size, (cfg.trainer.micro_batch_size, 64))
                batches.append({"input_ids": ids, "targets": ids.roll(-1, 1)})
            totals = count_tokens(batches, False, device)
            for index, batch in enumerate(batches):
                model.set_requires_all_reduce(index == 1)
                objective(model, batch, totals)[0].backward()
            if step == 0:
                optimizer.step()
                optimizer.zero_grad()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    tensors = (model.parameters(), gradients, moments, model.buffers())
    parameters, of_gradients, of_moments, quantized = map(held_bytes, tensors)
    return parameters, of_gradients, of_moments, quantized, live.peak


def measure_all() -> list[tuple[int, int, int, int, int]]:
    return [measure(cfg) for cfg in REAL_CONFIGS]


@pytest.mark.ranks
def test_real_ranks_hold_what_was_planned() -> None:
    """Sums of real storages after two real steps on two ranks: state to 1%, the peak to 20%."""
    for cfg, measured in zip(REAL_CONFIGS, run_ranks(RANKS, measure_all)[0], strict=True):
        plan = plan_config(
            model=cfg.model,
            data=cfg.data,
            trainer=cfg.trainer,
            parallel=cfg.parallel,
            adapter=cfg.adapter,
            optimizer=cfg.optimizer,
            gpus=RANKS,
        )
        (planned, *_) = plan_memory(plan, plan_layout(plan), plan_micro_batch(plan))
        state = (planned.parameters, planned.gradients, planned.optimizer, planned.quantized)
        assert measured[:4] == pytest.approx(state, rel=0.01), plan
        assert measured[4] == pytest.approx(planned.total, rel=0.2), plan
