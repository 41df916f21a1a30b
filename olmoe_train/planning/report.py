"""What a training run would need: memory of a rank and which layouts fit, speed and days, without allocating
anything. Takes every key of `olmoe train` (experiment=olmoe_1b_7b_0924, ...) and those of the cluster: gpus,
gpu_memory_gib, mfu. No data and no GPU are needed.

The arithmetic is in memory.py (bytes) and flops.py; benchmarks/plan_memory.py holds it against real runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from olmoe_train.config.choices import ActivationCheckpointing, Offload, Precision, Strategy
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.duration import tokens_per_step, total_steps
from olmoe_train.planning.flops import FlopsPerToken, parameter_counts, peak_flops, train_flops_per_token
from olmoe_train.planning.memory import Layout, MicroBatch, RankMemory, rank_memory
from olmoe_train.planning.memory_deepspeed import host_memory, saved_memory, zero_memory

MIB, GIB = 2**20, 2**30
LOAD_FACTORS = (1.0, 2.0, 4.0)
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Speed:
    """How long the run takes at the given model FLOPs utilisation."""

    flops_per_token: FlopsPerToken
    """Forward and backward."""
    peak_flops: float
    """FLOP/s of one GPU."""
    tokens_per_step: int
    micro_batches: int
    """On each rank, a step."""
    steps: int
    tokens_per_second: float
    """Of all GPUs."""

    @property
    def seconds_per_step(self) -> float:
        return self.tokens_per_step / self.tokens_per_second

    @property
    def days(self) -> float:
        return self.steps * self.seconds_per_step / SECONDS_A_DAY


def plan_speed(cfg: PlanConfig) -> Speed:
    """tokens/s = gpus x peak x MFU / FLOPs a token; days = steps x tokens a step / (tokens/s) / 86,400."""
    flops = train_flops_per_token(olmoe_config(cfg.model), cfg.data.sequence_length)
    peak = gpu_peak_flops(cfg)
    return Speed(
        flops,
        peak,
        tokens_per_step(cfg),
        cfg.trainer.global_batch_size // (cfg.trainer.micro_batch_size * cfg.gpus),
        total_steps(cfg),
        cfg.gpus * peak * cfg.mfu / flops.total,
    )


def gpu_peak_flops(cfg: PlanConfig) -> float:
    if cfg.gpu_tflops is not None:
        return cfg.gpu_tflops * 1e12
    dtype = torch.bfloat16 if cfg.trainer.precision is Precision.bf16 else torch.float32
    peak = peak_flops("H100", dtype)
    assert peak is not None
    return peak


def plan_layout(cfg: PlanConfig) -> Layout:
    parallel = cfg.parallel
    return Layout(
        parallel.strategy,
        cfg.gpus,
        parallel.expert_parallel_size,
        parallel.replicate_size,
        parallel.zero_stage,
        parallel.offload,
        parallel.reshard_after_forward,
        parallel.prefetch,
    )


def plan_micro_batch(cfg: TrainConfig) -> MicroBatch:
    trainer = cfg.trainer
    return MicroBatch(
        trainer.micro_batch_size,
        cfg.data.sequence_length,
        trainer.precision,
        trainer.activation_checkpointing,
    )


def plan_memory(cfg: PlanConfig, layout: Layout, batch: MicroBatch) -> list[RankMemory]:
    """The rank's memory at each load factor; a single one where rows stay at home (EP 1)."""
    config = olmoe_config(cfg.model)
    factors = LOAD_FACTORS if layout.expert_parallel_size > 1 else LOAD_FACTORS[:1]
    memory = zero_memory if layout.strategy is Strategy.deepspeed else rank_memory
    return [memory(config, layout, replace(batch, load_factor=factor)) for factor in factors]


IsValid = Callable[[PlanConfig], bool]
"""Whether `olmoe train` would accept a configuration on plan.gpus ranks."""


def possible_layouts(cfg: PlanConfig, is_valid: IsValid) -> list[Layout]:
    """Layouts of these GPUs that `olmoe train` takes, by EP size: fsdp by number of copies, ddp, and
    deepspeed by stage and, with ZeRO-3, what is offloaded."""
    divisors = [n for n in range(1, cfg.gpus + 1) if cfg.gpus % n == 0]
    sizes = [n for n in divisors if cfg.model.num_experts % n == 0]
    candidates = [Layout(Strategy.fsdp, cfg.gpus, size, copies) for copies in divisors for size in sizes]
    candidates += [Layout(Strategy.ddp, cfg.gpus, size) for size in sizes]
    kinds = [(stage, Offload.none) for stage in (1, 2, 3)] + [(3, Offload.optimizer), (3, Offload.parameters)]
    candidates += [Layout(Strategy.deepspeed, cfg.gpus, size, 1, *kind) for kind in kinds for size in sizes]
    gathering = {name: getattr(cfg.parallel, name) for name in ("reshard_after_forward", "prefetch")}
    return [replace(layout, **gathering) for layout in candidates if _works(cfg, layout, is_valid)]


def _works(
    cfg: PlanConfig,
    layout: Layout,
    is_valid: IsValid,
    mode: ActivationCheckpointing = ActivationCheckpointing.none,
) -> bool:
    parallel = ParallelConfig(
        strategy=layout.strategy,
        expert_parallel_size=layout.expert_parallel_size,
        replicate_size=layout.replicate_size,
        zero_stage=layout.zero_stage,
        offload=layout.offload,
    )
    trainer = replace(cfg.trainer, activation_checkpointing=mode)
    return is_valid(replace(cfg, parallel=parallel, trainer=trainer))


def largest_micro_batch(cfg: PlanConfig, layout: Layout, batch: MicroBatch) -> int:
    """Most sequences, doubling from 1, that fit and divide the batch; 0: not one. At load factor 1."""
    most, sequences = 0, 1
    while cfg.trainer.global_batch_size % (sequences * cfg.gpus) == 0:
        if not fits(cfg, plan_memory(cfg, layout, replace(batch, sequences=sequences))[0]):
            break
        most, sequences = sequences, 2 * sequences
    return most


def fits(cfg: PlanConfig, memory: RankMemory) -> bool:
    return memory.total <= (cfg.gpu_memory_gib - cfg.reserve_gib) * GIB


def run_lines(cfg: PlanConfig) -> list[str]:
    """Model, step, and time."""
    counts, speed, trainer = parameter_counts(olmoe_config(cfg.model)), plan_speed(cfg), cfg.trainer
    flops = speed.flops_per_token
    parts = ", ".join(f"{i.name.replace('_', ' ')} {getattr(flops, i.name) / 1e9:.4g}" for i in fields(flops))
    length, tokens, a_second = cfg.data.sequence_length, speed.tokens_per_step, speed.tokens_per_second
    time = f"{speed.days:,.1f} days" if speed.days >= 1 else f"{24 * speed.days:.2f} hours"
    rows = {
        "parameters": f"{counts.total:,}; {counts.active:,} act on a token",
        "a token": f"{flops.total / 1e9:.4g} GFLOP forward and backward: {parts}",
        "a step": f"{trainer.global_batch_size:,} sequences x {length:,} = {tokens:,} tokens: on each of "
        f"{cfg.gpus:,} GPUs {speed.micro_batches:,} x {trainer.micro_batch_size} sequences",
        "speed": f"{a_second:,.0f} tokens/s ({a_second / cfg.gpus:,.0f} a GPU), "
        f"{speed.seconds_per_step:.2f} s a step, at mfu {cfg.mfu:.1%} of "
        f"{speed.peak_flops / 1e12:,.1f} TFLOP/s a GPU",
        "the run": f"{speed.steps:,} steps, {speed.steps * tokens:,} tokens: {time}",
    }
    return [f"{name:<12}{text}" for name, text in rows.items()]


def memory_lines(cfg: PlanConfig) -> list[str]:
    """The chosen layout, part by part."""
    layout, batch = plan_layout(cfg), plan_micro_batch(cfg)
    memories = plan_memory(cfg, layout, batch)
    name, unit = _unit(memories[0])
    title = f"memory of the fullest rank in {name}: {describe(layout)}, {batch.precision.value}"
    tokens = f"micro-batch {batch.sequences} x {batch.sequence_length:,}"
    lines = [f"{title}, {tokens}, activation checkpointing {batch.checkpointing.value}"]
    if len(memories) > 1:
        lines.append("load: rows that the rank's experts receive, as a multiple of the mean over ranks")
        lines.append(f"  {'':<16}" + "".join(f"{f'load {factor:.0f}x':>10}" for factor in LOAD_FACTORS))
    for part in [item.name for item in fields(RankMemory)] + ["total"]:
        values = "".join(f"{getattr(memory, part) / unit:10.2f}" for memory in memories)
        lines.append(f"  {part.replace('_', '-'):<16}{values}")
    fitting = "".join(f"{'yes' if fits(cfg, memory) else 'no':>10}" for memory in memories)
    lines.append(f"  {'fits ' + _room(cfg):<16}{fitting}")
    if host := host_memory(olmoe_config(cfg.model), layout, batch):
        lines.append(f"  offloaded to the CPU: {host / unit:.2f} {name} a GPU")
    if cfg.checkpoint.async_save and layout.strategy is not Strategy.deepspeed:
        copied = memories[0].parameters + memories[0].optimizer
        lines.append(f"  copied to the CPU for checkpoint.async_save: {copied / unit:.2f} {name} a GPU")
    if layout.strategy is Strategy.deepspeed:
        copied = saved_memory(olmoe_config(cfg.model), layout)
        lines.append(f"  copied to the CPU for every save: {copied / unit:.2f} {name} a GPU")
    most = [
        f"{mode.value} {largest_micro_batch(cfg, layout, replace(batch, checkpointing=mode))}"
        for mode in ActivationCheckpointing
    ]
    lines.append(f"  most sequences a micro-batch that fit, by activation checkpointing: {', '.join(most)}")
    return lines


def layout_lines(cfg: PlanConfig, is_valid: IsValid) -> list[str]:
    """Every layout's total."""
    batch = plan_micro_batch(cfg)
    name, unit = _unit(plan_memory(cfg, plan_layout(cfg), batch)[0])
    modes = "".join(f"{mode.value:>17}" for mode in ActivationCheckpointing)
    lines = [
        f"all layouts of {cfg.gpus:,} GPUs: {name} at load 1x by activation checkpointing; does it fit?",
        "(to 2x: up to that load; state: parameters, gradients and optimizer)",
        f"  {'strategy':<20}{'expert_parallel_size':>21}{'replicate_size':>15}{'state':>9}{modes}",
    ]
    for layout in possible_layouts(cfg, is_valid):
        cells, state = "", 0
        for mode in ActivationCheckpointing:
            memories = plan_memory(cfg, layout, replace(batch, checkpointing=mode))
            state = memories[0].state
            if not _works(cfg, layout, is_valid, mode):
                cells += f"{'refused':>9}{'':8}"
                continue
            cells += f"{memories[0].total / unit:9.1f} {_fits_to(cfg, memories):<7}"
        here = "<- this configuration" if layout == plan_layout(cfg) else ""
        lines.append(
            f"  {_strategy(layout):<20}{layout.expert_parallel_size:>21}{layout.replicate_size:>15}"
            f"{state / unit:9.1f}{cells}{here}".rstrip()
        )
    return lines


def describe(layout: Layout) -> str:
    copies = f", {layout.replicate_size} copies" if layout.replicate_size > 1 else ""
    expert_parallel = f"expert parallel {layout.expert_parallel_size}"
    return f"{_strategy(layout)}{copies}, {expert_parallel}, {layout.gpus:,} GPUs"


def _strategy(layout: Layout) -> str:
    if layout.strategy is not Strategy.deepspeed:
        return layout.strategy.value
    offloaded = "" if layout.offload is Offload.none else f", {layout.offload.value} off"
    return f"ZeRO-{layout.zero_stage}{offloaded}"


def _unit(memory: RankMemory) -> tuple[str, int]:
    """What to print bytes in."""
    return ("GiB", GIB) if memory.total >= GIB else ("MiB", MIB)


def _room(cfg: PlanConfig) -> str:
    return f"{cfg.gpu_memory_gib:g} - {cfg.reserve_gib:g}"


def _fits_to(cfg: PlanConfig, memories: list[RankMemory]) -> str:
    """yes, no, or the load factor up to which it fits."""
    fitting = [factor for factor, memory in zip(LOAD_FACTORS, memories, strict=False) if fits(cfg, memory)]
    if len(fitting) == len(memories):
        return "yes"
    return f"to {fitting[-1]:.0f}x" if fitting else "no"
