"""`olmoe plan optimise=tokens_per_day`: the cost of a step by hand, and which layouts are ranked."""

from dataclasses import replace
from typing import Any

import pytest

from olmoe_train.cli.plan import check, is_valid, main
from olmoe_train.config.choices import ActivationCheckpointing, Gpu, Optimise, Precision, Strategy
from olmoe_train.config.cluster import CostConfig
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.cost import Rates, rank_load, step_cost
from olmoe_train.planning.flops import train_flops_per_token
from olmoe_train.planning.gpus import GPUS, gpu_links, gpu_memory_gib, gpu_peak_flops
from olmoe_train.planning.memory import rank_memory
from olmoe_train.planning.ranking import rank_layouts
from olmoe_train.planning.report import GIB, fits, plan_layout, plan_memory, plan_micro_batch
from olmoe_train.planning.traffic import Links, step_traffic
from olmoe_train.training.preflight.checks import configuration_errors
from olmoe_train.utils.errors import UserError
from tests.support.plans import OLMOE_1B_7B, ONE_SEQUENCE, TOTAL, fsdp, plan_config

SMALL = TrainerConfig(max_steps=100, global_batch_size=32, micro_batch_size=1)


def plan(gpus: int, **changes: object) -> PlanConfig:
    """With few micro-batches to choose from, so that a ranking takes little time."""
    return plan_config(gpus=gpus, optimise=Optimise.tokens_per_day, **{"trainer": SMALL} | changes)


def keys(cfg: PlanConfig) -> tuple[Strategy, int, int, int, ActivationCheckpointing]:
    parallel, trainer = cfg.parallel, cfg.trainer
    layout = (parallel.strategy, parallel.expert_parallel_size, parallel.replicate_size)
    return (*layout, trainer.micro_batch_size, trainer.activation_checkpointing)


def test_a_step_by_hand() -> None:
    """OLMoE-1B-7B on 8 GPUs, EP 8, 32 micro-batches of 4 x 4096 tokens per rank, full recomputation, at 500
    TFLOP/s, and with the busiest expert 63% above the mean: its rank has 1 + 0.63 x 56 / (8 x 63) = 1.07
    times the rows."""
    load = rank_load(OLMOE_1B_7B, 8, max_violation=0.63)
    assert load == pytest.approx(1.07)
    layout = fsdp(8, expert_parallel=8)
    batch = replace(ONE_SEQUENCE, sequences=4, checkpointing=ActivationCheckpointing.full, load_factor=load)
    links = Links(8, nvlink=450e9, network=50e9)
    traffic = step_traffic(OLMOE_1B_7B, layout, batch, 32, links)
    flops, memory = train_flops_per_token(OLMOE_1B_7B, 4096), rank_memory(OLMOE_1B_7B, layout, batch)
    rates = Rates(flops=500e12, memory=3.35e12, links=links)
    cost = step_cost(OLMOE_1B_7B, flops, batch, 32, memory, traffic, rates)
    tokens = 1024 * 4096 / 8
    assert cost.arithmetic == pytest.approx(tokens * 7.878672384e9 / 500e12)  # 8.261 s
    # Everything but the head (0.618 GFLOP) is computed again: a third of 7.2605 GFLOP per token.
    assert cost.recomputation == pytest.approx(tokens * (7.878672384e9 - 0.618135552e9) / 3 / 500e12)
    # Six exchanges of 469,762,048 bytes in 16 layers and 32 micro-batches.
    assert cost.all_to_all == pytest.approx(32 * 16 * 6 * 469_762_048 / 450e9)  # 3.207 s
    experts = tokens * 4.831838208e9 * 4 / 3 / 500e12
    assert cost.imbalance == pytest.approx(0.07 * (experts + cost.all_to_all))
    # 12 bytes of weight, gradient and moments more than the 16 that are held: 28 per parameter.
    assert cost.update == pytest.approx(28 * TOTAL / 8 / 3.35e12)  # 7.2 ms
    assert cost.exposed == 0.0  # 0.21 s on the links, behind 11 s of computation
    assert cost.total == sum(vars(cost).values())
    nothing_hidden = step_cost(OLMOE_1B_7B, flops, batch, 32, memory, traffic, replace(rates, overlap=0.0))
    assert nothing_hidden.exposed == pytest.approx(traffic.weights_seconds)
    assert nothing_hidden.total == pytest.approx(cost.total + traffic.weights_seconds)


def test_load_of_the_busiest_rank() -> None:
    """A rank with all experts has all rows; one with a single expert has those of the busiest one."""
    assert rank_load(OLMOE_1B_7B, 1, 2.0) == 1.0
    assert rank_load(OLMOE_1B_7B, 64, 2.0) == pytest.approx(3.0)
    # One expert gets every row: its rank has 8 times the mean of 8 ranks.
    assert rank_load(OLMOE_1B_7B, 8, 1000.0) == pytest.approx(8.0)


@pytest.mark.parametrize("gpu_memory", [80.0, 26.0])
def test_the_ranking_has_what_is_accepted_and_fits(gpu_memory: float) -> None:
    cfg = plan(8, gpu_memory_gib=gpu_memory)
    ranking = rank_layouts(cfg, is_valid)
    assert len({keys(item.cfg) for item in ranking}) == len(ranking) > 5
    for item in ranking:
        assert configuration_errors(item.cfg, 8) == []
        memory = plan_memory(item.cfg, plan_layout(item.cfg), plan_micro_batch(item.cfg))[0]
        assert memory.total <= item.memory.total <= (gpu_memory - 6) * GIB
    assert [item.cost.total for item in ranking] == sorted(item.cost.total for item in ranking)
    # Whatever is not in the ranking is refused or does not fit.
    every = {keys(item.cfg) for item in rank_layouts(replace(cfg, gpu_memory_gib=10_000.0), is_valid)}
    assert {strategy for strategy, *_ in every} == {Strategy.fsdp, Strategy.ddp}
    assert {mode for *_, mode in every} == set(ActivationCheckpointing)
    missing = every - {keys(item.cfg) for item in ranking}
    for strategy, size, copies, sequences, mode in missing:
        parallel = ParallelConfig(strategy, size, copies)
        trainer = replace(SMALL, micro_batch_size=sequences, activation_checkpointing=mode)
        other = replace(cfg, parallel=parallel, trainer=trainer)
        assert not fits(other, plan_memory(other, plan_layout(other), plan_micro_batch(other))[-1])

    # A preflight that refuses the best layout and its micro-batch makes another one the best.
    best = keys(ranking[0].cfg)
    refused = rank_layouts(cfg, lambda tried: is_valid(tried) and keys(tried) != best)
    assert keys(refused[0].cfg) == keys(ranking[1].cfg)


def test_nothing_fits() -> None:
    with pytest.raises(UserError, match="no layout of fsdp or ddp fits into 10 GiB per GPU"):
        main(plan(8, gpu_memory_gib=16.0))


def test_faster_links_never_lower_the_tokens_per_day() -> None:
    """On two nodes of two GPUs."""
    cfg = plan(4, mfu=0.5)

    def tokens_per_day(**changes: Any) -> dict[tuple[Any, ...], float]:
        ranking = rank_layouts(replace(cfg, cost=CostConfig(gpus_per_node=2, **changes)), is_valid)
        return {keys(item.cfg): item.tokens_per_day for item in ranking}

    fast = tokens_per_day()
    for slower in ({"network_gb_per_second": 2.0}, {"nvlink_gb_per_second": 20.0}, {"overlap": 0.0}):
        slow = tokens_per_day(**slower)
        assert slow.keys() == fast.keys()
        assert all(fast[layout] >= slow[layout] for layout in slow)
        assert sum(fast.values()) > sum(slow.values())
    even = tokens_per_day(max_violation=0.0)
    for layout in fast:
        assert (fast[layout] < even[layout]) == (layout[1] > 1)  # with expert parallelism alone


def test_the_plan_is_that_of_the_best_layout(capsys: pytest.CaptureFixture[str]) -> None:
    """The configured micro-batch is not looked at: 4 x 16 sequences would be more than the batch of 32."""
    trainer = TrainerConfig(max_steps=100, global_batch_size=32, micro_batch_size=4)
    cfg = plan(16, trainer=trainer)
    with pytest.raises(UserError, match=r"trainer\.global_batch_size=32: must be a multiple"):
        check(replace(cfg, optimise=Optimise.none))
    main(cfg)
    told = capsys.readouterr().out.splitlines()
    best = next(line for line in told if line.startswith("best: "))
    chosen = dict(pair.split("=") for pair in best.removeprefix("best: ").split())
    assert chosen == {
        "parallel.strategy": "fsdp",
        "parallel.expert_parallel_size": "1",
        "parallel.replicate_size": "1",
        "trainer.micro_batch_size": "2",
        "trainer.activation_checkpointing": "none",
    }
    assert any("GPUs x micro-batches x sequences: 16 x 1 x 2" in line for line in told)
    first = told[next(number for number, line in enumerate(told) if line.startswith("  strategy")) + 1]
    assert first.split()[:5] == ["fsdp", "1", "1", "2", "none"]
    (memory,) = {line.split()[1] for line in told if line.startswith("  total ")}
    assert float(first.split()[5]) == pytest.approx(float(memory), abs=0.06)
    # The days of the first lines are those of the ranking.
    (hours,) = (line.split(": ")[-1] for line in told if line.startswith("run  "))
    assert hours == f"{24 * float(first.split()[7]):.2f} hours"


def test_keys_of_the_cluster() -> None:
    assert set(GPUS) == set(Gpu)
    for gpu in Gpu:
        cfg = plan(8, gpu=gpu)
        assert gpu_memory_gib(cfg) == GPUS[gpu].memory_gib
        assert gpu_peak_flops(cfg) > gpu_peak_flops(
            replace(cfg, trainer=replace(cfg.trainer, precision=Precision.fp32))
        )
    h200 = plan(8, gpu=Gpu.h200)
    assert (gpu_memory_gib(h200), gpu_peak_flops(h200)) == (141.0, 989.5e12)
    assert gpu_links(h200) == Links() == gpu_links(plan(8))
    own = replace(h200, gpu_memory_gib=100.0, gpu_tflops=500.0, cost=CostConfig(4, 100.0, 25.0))
    assert (gpu_memory_gib(own), gpu_peak_flops(own)) == (100.0, 500e12)
    assert gpu_links(own) == Links(4, 100e9, 25e9)
    wrong = CostConfig(gpus_per_node=0, nvlink_gb_per_second=-1.0, overlap=1.5, max_violation=-1.0)
    with pytest.raises(UserError) as caught:
        check(plan(8, cost=wrong))
    for text in (
        "cost.gpus_per_node=0: must be positive",
        "cost.nvlink_gb_per_second=-1.0: must be positive",
        "cost.overlap=1.5: is a fraction",
        "cost.max_violation=-1.0: must not be negative",
    ):
        assert text in str(caught.value)
