"""`olmoe plan optimise=tokens_per_day`: the layouts that fit, by the time of their step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from olmoe_train.config.adapter import adapter_spec
from olmoe_train.config.choices import ActivationCheckpointing, Strategy
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import ParallelConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.planning.adapter import adapter_plan
from olmoe_train.planning.cost import Rates, StepCost, rank_load, step_cost
from olmoe_train.planning.flops import train_flops_per_token
from olmoe_train.planning.gpus import GPUS, gpu_links, gpu_memory_gib, gpu_peak_flops
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.memory import RankMemory, rank_memory
from olmoe_train.planning.report import (
    GIB,
    SECONDS_PER_DAY,
    IsValid,
    fits,
    plan_layout,
    plan_micro_batch,
    plan_speed,
    possible_layouts,
)
from olmoe_train.planning.traffic import StepTraffic, step_traffic
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.tables import aligned

SHOWN = 10


@dataclass(frozen=True)
class Candidate:
    """One layout with its micro-batch, that `olmoe train` accepts and that fits."""

    cfg: PlanConfig
    """The plan with this layout. Its mfu is that of the whole step."""
    memory: RankMemory
    """Of the rank with the busiest expert."""
    traffic: StepTraffic
    cost: StepCost

    @property
    def tokens_per_day(self) -> float:
        """Over all GPUs, without failures."""
        return plan_speed(self.cfg).tokens_per_second * SECONDS_PER_DAY


def without_layout(cfg: PlanConfig) -> PlanConfig:
    """The configuration with the least that can be chosen: fsdp, and one sequence per micro-batch."""
    return with_layout(cfg, ParallelLayout(Strategy.fsdp, cfg.gpus), 1, ActivationCheckpointing.none)


def with_layout(
    cfg: PlanConfig, layout: ParallelLayout, sequences: int, mode: ActivationCheckpointing
) -> PlanConfig:
    """The configuration with this layout, trainer.micro_batch_size and trainer.activation_checkpointing."""
    parallel = ParallelConfig(
        strategy=layout.strategy,
        expert_parallel_size=layout.expert_parallel_size,
        replicate_size=layout.replicate_size,
        reshard_after_forward=cfg.parallel.reshard_after_forward,
        prefetch=cfg.parallel.prefetch,
    )
    trainer = replace(cfg.trainer, micro_batch_size=sequences, activation_checkpointing=mode)
    return replace(cfg, parallel=parallel, trainer=trainer)


def plan_rates(cfg: PlanConfig) -> Rates:
    """How fast one GPU works: its peak times mfu, and the bandwidths of `gpu` or of `cost`."""
    memory = GPUS[cfg.gpu].memory_bandwidth
    return Rates(gpu_peak_flops(cfg) * cfg.mfu, memory, gpu_links(cfg), cfg.cost.overlap)


def rank_layouts(cfg: PlanConfig, is_valid: IsValid) -> list[Candidate]:
    """The layouts of fsdp and ddp that `olmoe train` accepts and that fit, fastest first.

    Of equally fast ones, the one with less time on the links comes first, then the one with less memory.
    """
    found = []
    for tried in _configurations(cfg, is_valid):
        memory = _memory(tried)
        if fits(tried, memory) and is_valid(tried):
            found.append(_candidate(tried, memory))
    return sorted(found, key=lambda item: (item.cost.total, item.traffic.weights_seconds, item.memory.total))


def _configurations(cfg: PlanConfig, is_valid: IsValid) -> Iterator[PlanConfig]:
    """Every layout with every micro-batch that is a power of two and divides the batch, in every mode."""
    base = without_layout(cfg)
    common = math.gcd(*BatchSizes.of(cfg.trainer, cfg.data.sequence_length).all)
    for layout in possible_layouts(base, is_valid):
        if layout.strategy is Strategy.deepspeed:
            continue  # traffic.py has no model of it
        for mode in ActivationCheckpointing:
            sequences = 1
            while common % (sequences * cfg.gpus) == 0:
                yield with_layout(cfg, layout, sequences, mode)
                sequences *= 2


def _memory(cfg: PlanConfig) -> RankMemory:
    """The memory of the rank with the busiest expert."""
    config, layout = olmoe_config(cfg.model), plan_layout(cfg)
    load = rank_load(config, layout.expert_parallel_size, cfg.cost.max_violation)
    batch = replace(plan_micro_batch(cfg), load_factor=load)
    averaged, fused = cfg.trainer.ema_decay is not None, cfg.trainer.fused_backward
    return rank_memory(config, layout, batch, adapter_plan(cfg.adapter), cfg.optimizer, averaged, fused)


def _candidate(cfg: PlanConfig, memory: RankMemory) -> Candidate:
    config, layout = olmoe_config(cfg.model), plan_layout(cfg)
    rates, micro_batches = plan_rates(cfg), plan_speed(cfg).micro_batches
    load = rank_load(config, layout.expert_parallel_size, cfg.cost.max_violation)
    batch = replace(plan_micro_batch(cfg), load_factor=load)
    flops = train_flops_per_token(config, cfg.data.sequence_length, adapter_spec(cfg.adapter))
    traffic = step_traffic(config, layout, batch, micro_batches, rates.links, adapter_plan(cfg.adapter))
    cost = step_cost(config, flops, batch, micro_batches, memory, traffic, rates)
    return Candidate(replace(cfg, mfu=cfg.mfu * cost.arithmetic / cost.total), memory, traffic, cost)


def best_layout(cfg: PlanConfig, ranking: list[Candidate]) -> Candidate:
    """The first of the ranking.

    Raises:
        UserError: Nothing fits.
    """
    if not ranking:
        room = gpu_memory_gib(cfg) - cfg.reserve_gib
        raise UserError(
            f"gpus={cfg.gpus}: no layout of fsdp or ddp fits into {room:g} GiB per GPU with one sequence per "
            "micro-batch; take more or larger GPUs, or see which layouts of deepspeed with offloading fit: "
            "leave optimise out"
        )
    return ranking[0]


def ranking_lines(cfg: PlanConfig, ranking: list[Candidate]) -> list[str]:
    """Lines with the fastest layouts, what their time is spent on, the keys of the best, and assumptions."""
    best = best_layout(cfg, ranking)
    header = ["strategy", "EP", "copies", "micro-batch", "checkpointing", "GiB", "10^9 tokens/day", "days"]
    header += [name.replace("_", "-") for name in best.cost.shares()]
    fastest = {plan_layout(item.cfg): item for item in reversed(ranking)}  # the fastest of each comes last
    shown = [item for item in ranking if fastest[plan_layout(item.cfg)] is item]
    return [
        f"fastest {min(SHOWN, len(shown))} of {len(shown)} layouts of {cfg.gpus:,} GPUs that fit",
        "(each with its fastest micro-batch and checkpointing; EP: parallel.expert_parallel_size; copies: of",
        "the model; GiB: of the rank with the busiest expert; last columns: parts of a step in %)",
        *(f"  {line}" for line in aligned([header, *map(_row, shown[:SHOWN])], left=(0, 4))),
        f"best: {' '.join(_keys(best.cfg))}",
        *_assumptions(cfg),
    ]


def _keys(cfg: PlanConfig) -> list[str]:
    """The keys that were chosen, as on the command line."""
    parallel, trainer = cfg.parallel, cfg.trainer
    return [
        f"parallel.strategy={parallel.strategy.value}",
        f"parallel.expert_parallel_size={parallel.expert_parallel_size}",
        f"parallel.replicate_size={parallel.replicate_size}",
        f"trainer.micro_batch_size={trainer.micro_batch_size}",
        f"trainer.activation_checkpointing={trainer.activation_checkpointing.value}",
    ]


def _row(item: Candidate) -> list[str]:
    parallel, trainer, speed = item.cfg.parallel, item.cfg.trainer, plan_speed(item.cfg)
    return [
        parallel.strategy.value,
        str(parallel.expert_parallel_size),
        str(plan_layout(item.cfg).gpus // plan_layout(item.cfg).shard_size),
        str(trainer.micro_batch_size),
        trainer.activation_checkpointing.value,
        f"{item.memory.total / GIB:.1f}",
        f"{item.tokens_per_day / 1e9:.4g}",
        f"{speed.days:.4g}",
        *(f"{100 * share:.1f}" for share in item.cost.shares().values()),
    ]


def _assumptions(cfg: PlanConfig) -> list[str]:
    rates, cost, peak = plan_rates(cfg), cfg.cost, gpu_peak_flops(cfg) / 1e12
    rows = {
        "arithmetic": f"{rates.flops / 1e12:,.4g} TFLOP/s, mfu={cfg.mfu:g} of {peak:,.4g}; any micro-batch",
        "links": f"{rates.links.nvlink / 1e9:g} GB/s in nodes of {cost.gpus_per_node} GPUs, "
        f"{rates.links.network / 1e9:g} GB/s between nodes, per GPU and direction; no latency",
        "overlap": f"computation hides up to {cost.overlap:.0%} of the time of weights and gradients, and "
        "nothing of all-to-alls",
        "imbalance": f"router/max_violation {cost.max_violation:g}; all wait for the busiest expert's rank",
        "update": f"memory at {rates.memory / 1e12:g} TB/s; matrix products of Muon are not counted",
        "error": "not measured on GPUs; on CPU ranks see docs/benchmarks/memory-and-scaling.md",
    }
    return ["assumptions:", *(f"  {name:<12}{text}" for name, text in rows.items())]
