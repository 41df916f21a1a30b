"""`olmoe plan`: bytes by hand, against autograd's tensors and against real ranks; speed, traffic, errors.

OLMoE-1B-7B in parts: experts 16 x 402,653,184; the rest of a layer 16,916,480 (four projections 2048 x 2048,
a router 64 x 2048, four norms of 2048); embedding, final norm and head 206,047,232. In all 6,919,161,856.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.plan_memory import LiveBytes, measure, predict
from olmoe_train.cli.plan import check, is_valid
from olmoe_train.config.choices import ActivationCheckpointing, ExpertsBackend, Offload, Precision, Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import CheckpointConfig, ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.losses import router_losses_from_stats
from olmoe_train.planning.layout import ParallelLayout, count_units
from olmoe_train.planning.memory import MicroBatch, _layer_kept, _layer_saved, rank_memory, saved_activations
from olmoe_train.planning.memory_deepspeed import host_memory
from olmoe_train.planning.report import (
    GIB,
    fits,
    largest_micro_batch,
    memory_lines,
    plan_layout,
    plan_memory,
    plan_micro_batch,
    plan_speed,
    possible_layouts,
    traffic_lines,
)
from olmoe_train.planning.traffic import Links, RankGroup, exchange, rank_group, ring, step_traffic
from olmoe_train.utils.errors import UserError
from tests.support.ranks import run_ranks

OLMOE_1B_7B = OlmoeConfig(intermediate_size=1024)  # the other defaults are the released model's
TOTAL, EXPERTS, DENSE, ROOT = 6_919_161_856, 402_653_184, 16_916_480, 206_047_232
ONE_SEQUENCE = MicroBatch(1, 4096, Precision.bf16, ActivationCheckpointing.none)
NONE, SELECTIVE, FULL = ActivationCheckpointing
SMALL = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
}


def fsdp(gpus: int, expert_parallel: int = 1, copies: int = 1) -> ParallelLayout:
    return ParallelLayout(Strategy.fsdp, gpus, expert_parallel, copies)


def plan_config(**changes: object) -> PlanConfig:
    sections = {
        "model": ModelConfig(),
        "data": DataConfig(dir="none", sequence_length=4096),
        "trainer": TrainerConfig(max_steps=100, global_batch_size=1024, micro_batch_size=4),
    }
    return PlanConfig(**sections | changes)  # type: ignore[arg-type]


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


def test_activations_of_the_released_model() -> None:
    """Per token and layer: norms 4 x (6 x 2048 + 4), attention 2 x 5 x 2048 + 4 x 16, router 2 x 2048 +
    4 x 64 + 4 + 8 x (32 + 4), rows 8 x 2 x 2 x 1024; with EP 8 x 2 x 2 x 2048."""
    norms, attention, router, rows = 49_168, 20_544, 4_644, 32_768
    layer = 4096 * (norms + attention + router + rows)
    assert _layer_saved(OLMOE_1B_7B, ONE_SEQUENCE) == layer
    assert _layer_saved(OLMOE_1B_7B, replace(ONE_SEQUENCE, exchanged=True)) == layer + 4096 * 65_536
    # Layer input 2 x 2048, routing 8 x 4 x 8.
    full = replace(ONE_SEQUENCE, checkpointing=FULL)
    assert _layer_kept(OLMOE_1B_7B, full) == 4096 * (4096 + 256)


@pytest.mark.parametrize("mode", ActivationCheckpointing)
@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(
    "variant",
    [{}, {"num_key_value_heads": 2}, {"clip_qkv": 1.0}, {"norm_topk_prob": True}],
    ids=["released", "grouped_query", "clip_qkv", "norm_topk_prob"],
)
def test_saved_activations_are_autograds(
    variant: dict[str, object], precision: Precision, mode: ActivationCheckpointing
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
    strategy: Strategy, expert_parallel: int, mode: ActivationCheckpointing, **gathering: bool | int
) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(**SMALL, experts_backend=ExpertsBackend.grouped_mm),  # type: ignore[arg-type]
        data=DataConfig(dir="none", sequence_length=64),
        trainer=TrainerConfig(
            max_steps=1, micro_batch_size=2, precision=Precision.fp32, activation_checkpointing=mode
        ),
        parallel=ParallelConfig(strategy=strategy, expert_parallel_size=expert_parallel, **gathering),  # type: ignore[arg-type]
    )


def dense(cfg: TrainConfig) -> TrainConfig:
    return replace(cfg, model=replace(cfg.model, intermediate_size=120, num_experts=1, num_experts_per_tok=1))


REAL_CONFIGS = [
    real_config(Strategy.fsdp, 1, NONE),
    real_config(Strategy.fsdp, 2, SELECTIVE),
    real_config(Strategy.ddp, 1, FULL),
    real_config(Strategy.ddp, 2, NONE),
    dense(real_config(Strategy.fsdp, 1, NONE)),
    real_config(Strategy.fsdp, 1, SELECTIVE, reshard_after_forward=False),
    real_config(Strategy.fsdp, 1, SELECTIVE, prefetch=2),
]


def _measure_all() -> list[tuple[int, int, int, int]]:
    results = [measure(cfg) for cfg in REAL_CONFIGS]
    return [(m.parameters, m.gradients, m.optimizer, m.peak) for m in results]


@pytest.mark.ranks
def test_real_ranks_hold_what_was_planned() -> None:
    """Sums of real storages after two real steps on two ranks: state to 1%, the peak to 20%."""
    for cfg, measured in zip(REAL_CONFIGS, run_ranks(RANKS, _measure_all)[0], strict=True):
        planned = predict(cfg, RANKS)
        state = (planned.parameters, planned.gradients, planned.optimizer)
        assert measured[:3] == pytest.approx(state, rel=0.01)
        assert measured[3] == pytest.approx(planned.total, rel=0.2)


def test_speed_of_the_released_run() -> None:
    """23,600 tokens/s a GPU at 7.8787 GFLOP a token are 18.8% of 989.5 TFLOP/s. On 256 GPUs 5.033T tokens at
    256 x 0.188 x 989.5e12 / 7.878672384e9 = 6,044,409 tokens/s are 832,670 s."""
    trainer = TrainerConfig(max_tokens=5_033_000_000_000, global_batch_size=1024, micro_batch_size=4)
    speed = plan_speed(plan_config(gpus=256, trainer=trainer))
    assert speed.tokens_per_step == 4_194_304
    assert speed.steps == 1_199_961
    assert speed.micro_batches == 1
    assert speed.tokens_per_second == pytest.approx(256 * 23_600, rel=1e-3)
    assert speed.days == pytest.approx(832_670 / 86_400, rel=1e-4)
    assert plan_speed(plan_config(gpu_tflops=2 * 989.5)).tokens_per_second == pytest.approx(
        2 * plan_speed(plan_config()).tokens_per_second
    )


def test_layouts_are_those_that_train_takes() -> None:
    layouts = possible_layouts(plan_config(), is_valid)
    zero = [layout for layout in layouts if layout.strategy is Strategy.deepspeed]
    others = [layout for layout in layouts if layout.strategy is not Strategy.deepspeed]
    found = {(x.strategy.name, x.expert_parallel_size, x.replicate_size) for x in others}
    by_copies = {1: (1, 2, 4, 8), 2: (1, 2, 4), 4: (1, 2), 8: (1,)}
    expected = {("fsdp", size, copies) for copies, sizes in by_copies.items() for size in sizes}
    assert found == expected | {("ddp", size, 1) for size in (1, 2, 4, 8)}
    kinds = {(1, Offload.none), (2, Offload.none), (3, Offload.none)}
    kinds |= {(3, Offload.optimizer), (3, Offload.parameters)}
    assert {(x.zero_stage, x.offload) for x in zero} == kinds
    assert len(zero) == len(kinds) * 4


def test_a_copy_for_asynchronous_saves_is_planned_for() -> None:
    """fp32 weights and two moments, 12 bytes a parameter of the rank."""
    told = memory_lines(plan_config(gpus=1, checkpoint=CheckpointConfig(async_save=True)))
    assert f"  copied to the CPU for checkpoint.async_save: {12 * TOTAL / GIB:.2f} GiB per GPU" in told
    assert not any("async_save" in line for line in memory_lines(plan_config(gpus=1)))


def test_deepspeeds_copy_for_a_save_is_planned_for() -> None:
    """12 bytes a parameter, over the ranks; experts over those that have the same ones, 8 / 4."""
    parallel = ParallelConfig(Strategy.deepspeed, 4, zero_stage=2)
    told = memory_lines(plan_config(gpus=8, parallel=parallel))
    assert f"  copied to the CPU for every save: {12 * TOTAL / 8 / GIB:.2f} GiB per GPU" in told
    assert not any("every save" in line for line in memory_lines(plan_config()))


def test_offloading_fits_the_released_model_on_one_gpu_of_80_gb() -> None:
    """bf16: 2 bytes a parameter stay, 20 more go to the CPU: masters, moments, gradients and their sum."""
    cfg, batch = plan_config(gpus=1), replace(ONE_SEQUENCE, checkpointing=FULL)
    offloaded = ParallelLayout(Strategy.deepspeed, 1, zero_stage=3, offload=Offload.optimizer)
    (memory,) = plan_memory(cfg, offloaded, batch)
    assert memory.state == memory.parameters == 2 * TOTAL
    assert host_memory(OLMOE_1B_7B, offloaded, batch) == 20 * TOTAL
    assert fits(cfg, memory)
    assert not fits(cfg, plan_memory(cfg, replace(offloaded, offload=Offload.none), batch)[0])
    assert not fits(cfg, plan_memory(cfg, fsdp(1), batch)[0])
    nothing_left = replace(offloaded, offload=Offload.parameters)
    assert plan_memory(cfg, nothing_left, batch)[0].state == 0
    assert host_memory(OLMOE_1B_7B, nothing_left, batch) == 22 * TOTAL


def test_what_fits() -> None:
    cfg = plan_config(gpu_memory_gib=40.0, reserve_gib=5.0)
    layout, batch = fsdp(8), replace(ONE_SEQUENCE, sequences=4)
    assert not fits(cfg, plan_memory(cfg, layout, batch)[0])
    most = largest_micro_batch(cfg, layout, batch)
    assert fits(cfg, plan_memory(cfg, layout, replace(batch, sequences=most))[0])
    assert not fits(cfg, plan_memory(cfg, layout, replace(batch, sequences=2 * most))[0])
    exactly = plan_memory(cfg, layout, batch)[0].total / 2**30
    assert fits(replace(cfg, gpu_memory_gib=exactly + 5.0), plan_memory(cfg, layout, batch)[0])
    assert len(plan_memory(cfg, fsdp(8, expert_parallel=2), batch)) == 3  # load factors 1, 2, 4


def test_times_on_links_by_hand() -> None:
    links = Links(gpus_per_node=8, nvlink=400.0, network=50.0)
    # One node: 7/8 of 800 bytes at 400 bytes/s. Four: each takes in 600 bytes by 8 cards, 775 by NVLink.
    assert ring(800, RankGroup(8, 8), links).seconds == pytest.approx(1.75)
    assert ring(800, RankGroup(32, 8), links).seconds == pytest.approx(775 / 400)
    assert ring(800, RankGroup(32, 8), replace(links, network=10.0)).seconds == pytest.approx(600 / 80)
    assert ring(800, RankGroup(4, 1), links).seconds == pytest.approx(600 / 50)
    assert ring(800, RankGroup(1, 1), links).seconds == ring(800, RankGroup(1, 1), links).bytes_sent == 0
    assert exchange(800, RankGroup(8, 8), links).seconds == pytest.approx(700 / 400)
    assert exchange(800, RankGroup(16, 8), links).seconds == pytest.approx(400 / 50)
    assert rank_group(1, 64, links) == RankGroup(64, 8)
    assert rank_group(8, 8, links) == RankGroup(8, 1)
    assert rank_group(2, 2, links) == RankGroup(2, 2)


def test_traffic_of_a_step_by_hand() -> None:
    """On 64 ranks, a micro-batch of four sequences and 4 a step."""
    batch, links = replace(ONE_SEQUENCE, sequences=4), Links()
    sharded = step_traffic(OLMOE_1B_7B, fsdp(64), batch, 4, links)
    assert sharded.all_gather.bytes_sent == 4 * 2 * (ROOT + 2 * 16 * (DENSE + EXPERTS)) * 63 // 64
    assert sharded.reduce_scatter.bytes_sent == 4 * 4 * TOTAL * 63 // 64
    assert sharded.all_reduce.bytes_sent == sharded.all_to_all.bytes_sent == 0

    hybrid = step_traffic(OLMOE_1B_7B, fsdp(64, expert_parallel=8, copies=8), batch, 4, links)
    # 16,384 tokens x 8 choices x 2048 x 2 bytes, 7 of 8 to others, four times in each of 16 layers.
    assert hybrid.all_to_all.bytes_sent == 4 * 4 * 16 * 469_762_048
    assert hybrid.all_to_all.seconds == pytest.approx(4 * 4 * 16 * 469_762_048 / 450e9)
    assert hybrid.all_gather.bytes_sent == 4 * 2 * (ROOT + 2 * 16 * DENSE) * 7 // 8
    # An eighth of the model, summed over 8 copies on 8 nodes: 2 x 7/8 of it, once a step.
    assert hybrid.all_reduce.bytes_sent == 2 * 4 * (TOTAL // 8) * 7 // 8
    assert hybrid.all_reduce.seconds == pytest.approx(2 * 4 * (TOTAL // 8) * 7 / 8 / 50e9)

    recomputed = step_traffic(OLMOE_1B_7B, fsdp(8, 8), replace(batch, checkpointing=FULL), 4, links)
    assert recomputed.all_to_all.bytes_sent == 4 * 6 * 16 * 469_762_048
    assert sharded.step_seconds(100.0) == 100.0
    assert hybrid.step_seconds(100.0) == 100.0 + hybrid.all_to_all.seconds
    assert sharded.step_seconds(0.0) == sharded.weights_seconds


def test_bytes_on_each_link_by_hand() -> None:
    """Nodes of 8; on a group's nodes its ranks share what comes from the others."""
    links = Links(gpus_per_node=8)
    on_four_nodes = ring(800, RankGroup(32, 8), links)
    # 31/32 of 800 bytes by NVLink; the 600 bytes of the other three nodes by 8 network cards.
    assert (on_four_nodes.node_bytes, on_four_nodes.network_bytes) == (775, 75)
    across = ring(800, RankGroup(4, 1), links)
    assert (across.node_bytes, across.network_bytes) == (0, across.bytes_sent) == (0, 600)
    # Of 16 ranks' rows 1/16 stay, 7/16 go to ranks on the node, 8/16 to the other one.
    rows = exchange(1600, RankGroup(16, 8), links)
    assert (rows.bytes_sent, rows.node_bytes, rows.network_bytes) == (1500, 700, 800)
    twice = (rows + rows).times(3)
    assert (twice.node_bytes, twice.network_bytes) == (6 * 700, 6 * 800)
    # 12 ranks do not fill nodes of 8: 4 a node, in three nodes.
    assert rank_group(1, 12, links) == RankGroup(12, 4)


def test_the_plan_prints_the_traffic_of_its_layout() -> None:
    """HSDP, 8 copies on 8 nodes, expert parallelism inside each; the numbers are those of
    test_traffic_of_a_step_by_hand."""
    cfg = plan_config(
        gpus=64, parallel=ParallelConfig(Strategy.fsdp, expert_parallel_size=8, replicate_size=8)
    )
    lines = traffic_lines(cfg)
    assert lines[0].startswith(
        "traffic of one GPU per step in GB: fsdp, 8 copies, expert parallel 8, 64 GPUs"
    )
    table = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in lines[4:8]}
    # All-gather, reduce-scatter and all-to-all stay in the node; the all-reduce is between nodes.
    gathered = 4 * 2 * (ROOT + 2 * 16 * DENSE) * 7 / 8 / 1e9
    rows = 4 * 4 * 16 * 469_762_048 / 1e9
    copies = 2 * 4 * (TOTAL // 8) * 7 / 8 / 1e9
    assert table["all-gather"][:3] == pytest.approx([gathered, gathered, 0], abs=0.005)
    assert table["all-to-all"][:3] == pytest.approx([rows, rows, 0], abs=0.005)
    assert table["all-reduce"][:3] == pytest.approx([copies, 0, copies], abs=0.005)
    planned = step_traffic(OLMOE_1B_7B, plan_layout(cfg), plan_micro_batch(cfg), 4, Links())
    for name, cells in table.items():
        kind = getattr(planned, name.replace("-", "_"))
        sizes = [size / 1e9 for size in (kind.bytes_sent, kind.node_bytes, kind.network_bytes)]
        assert cells == pytest.approx([*sizes, kind.seconds], abs=0.005), name
    assert any(f"{planned.all_to_all.seconds:.3g} s for the all-to-all" in line for line in lines)

    assert traffic_lines(plan_config(gpus=1)) == ["traffic between GPUs: none, with one GPU"]
    zero = plan_config(parallel=ParallelConfig(Strategy.deepspeed, zero_stage=2))
    assert traffic_lines(zero) == ["traffic between GPUs: not estimated for parallel.strategy=deepspeed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "gpus=0: must be positive"),
        ({"mfu": 40.0}, "40% is mfu=0.4"),
        ({"gpu_tflops": -1.0}, "gpu_tflops=-1.0: must be positive"),
        ({"reserve_gib": 90.0}, "reserve_gib=90.0: must be at least 0 and below gpu_memory_gib=80.0"),
        ({"gpus": 6}, "trainer.micro_batch_size x ranks = 4 x 6 = 24; the nearest is 1032"),
        (
            {"parallel": ParallelConfig(expert_parallel_size=3)},
            "parallel.expert_parallel_size=3: must divide",
        ),
        (
            {"parallel": ParallelConfig(replicate_size=3)},
            "parallel.replicate_size=3: must divide the 8 ranks",
        ),
        (
            {"trainer": TrainerConfig(max_epochs=2, global_batch_size=1024, micro_batch_size=4)},
            "trainer.max_epochs=2: a plan reads no data",
        ),
    ],
)
def test_wrong_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(plan_config(**changes))
    assert message in str(caught.value)


def olmoe(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "olmoe_train", "plan", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.slow
def test_the_verb_needs_no_data_and_works_anywhere(tmp_path: Path) -> None:
    # The epochs' length is in the data; the recipe's max_tokens will do.
    options = ("gpus=8", "gpu_memory_gib=80", "trainer.max_epochs=2")
    run = olmoe(tmp_path, "experiment=olmoe_1b_7b_0924", *options)
    assert run.returncode == 0, run.stderr
    for text in (
        "6,919,161,856; 1,282,017,280 active per token",
        "7.879 GFLOP",
        "1,024 sequences x 4,096 = 4,194,304 tokens; GPUs x micro-batches x sequences: 8 x 32 x 4",
        "1,199,961 steps",
        "traffic of one GPU per step in GB: fsdp",
    ):
        assert text in run.stdout
    rows = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines() if line.startswith("  ")}
    assert rows["parameters"] == ["3.22"]  # 6,919,161,856 x 4 / 8 / 2^30
    assert rows["optimizer"] == ["6.44"]
    assert run.stdout.count("<- this configuration") == 1
    assert not any(tmp_path.iterdir())

    wrong = olmoe(tmp_path, "experiment=olmoe_1b_7b_0924", "gpus=7", "mfu=2")
    assert wrong.returncode == 2
    assert "mfu=2.0: is a fraction" in wrong.stderr
    assert "trainer.global_batch_size=1024: must be a multiple" in wrong.stderr
