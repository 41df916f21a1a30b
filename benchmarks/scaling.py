"""Scaling of OLMoE-1B-7B on H100s, on paper: what a step sends over which link, and the least time it takes.

Prints the tables of "Scaling on paper" in docs/benchmarks/memory-and-scaling.md. Nothing is measured here.
The last one is that of `olmoe plan optimise=tokens_per_day`, for several numbers of GPUs.

    python benchmarks/scaling.py
"""

from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.cluster import CostConfig
from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.flops import train_flops_per_token
from olmoe_train.planning.layout import FP32, ParallelLayout, count_units
from olmoe_train.planning.memory import MicroBatch, rank_memory
from olmoe_train.planning.ranking import Candidate, rank_layouts
from olmoe_train.planning.traffic import Links, StepTraffic, step_traffic
from olmoe_train.training.preflight.checks import configuration_errors

CONFIG = OlmoeConfig(intermediate_size=1024)  # the other defaults are the released model's
GLOBAL_BATCH = 1024  # sequences of 4096 tokens, as released
BATCH = MicroBatch(4, 4096, Precision.bf16, ActivationCheckpointing.selective)
PEAK, MFU = 989.5e12, 0.36  # H100 SXM; 45,000 tokens/s per GPU, were there no communication
GB, GIB = 1e9, 2**30


def layouts(gpus: int) -> dict[str, ParallelLayout]:
    """By name; on one node HSDP is FSDP."""
    nodes = gpus // Links().gpus_per_node
    found = {
        "FSDP": ParallelLayout(Strategy.fsdp, gpus),
        "FSDP, EP 8": ParallelLayout(Strategy.fsdp, gpus, expert_parallel_size=8),
        f"HSDP {nodes} x 8": ParallelLayout(Strategy.fsdp, gpus, replicate_size=nodes),
        f"HSDP {nodes} x 8, EP 8": ParallelLayout(
            Strategy.fsdp, gpus, expert_parallel_size=8, replicate_size=nodes
        ),
    }
    return dict(list(found.items())[: 4 if nodes > 1 else 2])


def compute_seconds(gpus: int) -> float:
    """Of a step, at the MFU above."""
    flops = train_flops_per_token(CONFIG, BATCH.sequence_length).total
    return GLOBAL_BATCH * BATCH.sequence_length * flops / (gpus * PEAK * MFU)


def micro_batches(gpus: int) -> int:
    """On each rank, a step."""
    return GLOBAL_BATCH // (BATCH.sequences * gpus)


def traffic(layout: ParallelLayout) -> StepTraffic:
    return step_traffic(CONFIG, layout, BATCH, micro_batches(layout.gpus), Links())


def hidden_from(layout: ParallelLayout) -> float:
    """Tokens that a rank's micro-batch needs for its computation to last as long as its weights and gradients
    travel."""
    step, computed = traffic(layout), compute_seconds(layout.gpus)
    travel = step.all_gather.seconds + step.reduce_scatter.seconds  # both grow with the micro-batches
    return BATCH.tokens * travel / computed


def print_collectives() -> None:
    """One collective of each kind: what a layer gathers and reduces in all, what a rank sends to others."""
    print_row(
        "GPUs",
        "layout",
        "weights of a layer (GB)",
        "gradients (GB)",
        "all-to-all (GB)",
        "hidden from (tokens)",
    )
    print_row(*["---"] * 6)
    for gpus in (8, 64, 256):
        for name, layout in layouts(gpus).items():
            units = count_units(CONFIG, layout)
            gathered = sum(unit.gathered for unit in (units.dense, units.experts) if unit.shard_size > 1)
            sent = traffic(layout).all_to_all.bytes_sent / (micro_batches(gpus) * 4 * units.layers)
            sizes = (BATCH.element * gathered, FP32 * gathered, sent)
            cells = (f"{size / GB:.3f}" for size in sizes)
            print_row(str(gpus), name, *cells, f"{hidden_from(layout):,.0f}")


def print_steps() -> None:
    """Bytes that a rank sends in a step, by collective, and the times."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    times = ("weights (s)", "tokens (s)", "compute (s)", "step / compute")
    print_row("GPUs", "layout", "GiB per rank", *(f"{kind} (GB)" for kind in kinds), *times)
    print_row(*["---"] * 11)
    for gpus in (8, 64, 256):
        compute = compute_seconds(gpus)
        for name, layout in layouts(gpus).items():
            step = traffic(layout)
            sent = (step.all_gather, step.reduce_scatter, step.all_reduce, step.all_to_all)
            seconds = (step.weights_seconds, step.all_to_all.seconds, compute)
            print_row(
                str(gpus),
                name,
                f"{rank_memory(CONFIG, layout, BATCH).total / GIB:.1f}",
                *(f"{kind.bytes_sent / GB:.1f}" for kind in sent),
                *(f"{value:.2f}" for value in seconds),
                f"{step.step_seconds(compute) / compute:.2f}",
            )


def print_ranking() -> None:
    """The fastest layouts by the cost model: without and with expert parallelism, and with copies."""
    parts = ("arithmetic", "imbalance", "exposed", "all-to-all")
    columns = (
        "GPUs",
        "network (GB/s)",
        "EP",
        "copies",
        "micro-batch",
        "checkpointing",
        "GiB",
        "10^9 tokens/day",
    )
    print_row(*columns, *(f"{part} (%)" for part in parts))
    print_row(*["---"] * (len(columns) + len(parts)))
    trainer = TrainerConfig(max_steps=1, global_batch_size=GLOBAL_BATCH, micro_batch_size=1)
    data = DataConfig(dir="none", sequence_length=BATCH.sequence_length)
    for gpus, network in ((8, 50.0), (64, 50.0), (64, 5.0), (256, 50.0), (256, 5.0)):
        cost = CostConfig(network_gb_per_second=network)
        cfg = PlanConfig(data=data, trainer=trainer, gpus=gpus, mfu=MFU, cost=cost)
        ranking = rank_layouts(cfg, lambda tried: not configuration_errors(tried, tried.gpus))
        for parallel, copies in ((False, False), (False, True), (True, False), (True, True)):
            of_kind = [item for item in ranking if _is(item.cfg.parallel, parallel, copies)]
            if of_kind and (gpus > 8 or not copies):
                _print_candidate(of_kind[0], gpus, network, parts)


def _is(parallel: ParallelConfig, expert_parallel: bool, copies: bool) -> bool:
    """Whether it is a layout of fsdp of this kind."""
    kind = (parallel.expert_parallel_size > 1, parallel.replicate_size > 1)
    return parallel.strategy is Strategy.fsdp and kind == (expert_parallel, copies)


def _print_candidate(item: Candidate, gpus: int, network: float, parts: tuple[str, ...]) -> None:
    parallel, trainer, shares = item.cfg.parallel, item.cfg.trainer, item.cost.shares()
    print_row(
        str(gpus),
        f"{network:g}",
        str(parallel.expert_parallel_size),
        str(parallel.replicate_size),
        str(trainer.micro_batch_size),
        trainer.activation_checkpointing.value,
        f"{item.memory.total / GIB:.1f}",
        f"{item.tokens_per_day / 1e9:.1f}",
        *(f"{100 * shares[part.replace('-', '_')]:.1f}" for part in parts),
    )


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    print_collectives()
    print()
    print_steps()
    print()
    print_ranking()
