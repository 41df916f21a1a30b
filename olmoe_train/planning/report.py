"""What `olmoe plan` prints: the speed and duration of a run, the memory and traffic of one rank, and which
layouts of the GPUs fit.

The arithmetic is in memory.py and memory_deepspeed.py (bytes held), traffic.py (bytes sent) and flops.py.
benchmarks/plan_memory.py compares the memory with real runs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from olmoe_train.config.adapter import adapter_spec
from olmoe_train.config.choices import ActivationCheckpointing, Offload, Reference, Strategy
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.config.train import ParallelConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.stages import data_stages
from olmoe_train.planning.adapter import adapter_counts, adapter_plan
from olmoe_train.planning.duration import schedule_in_words, total_steps
from olmoe_train.planning.flops import FlopsPerToken, parameter_counts, train_flops_per_token
from olmoe_train.planning.gpus import gpu_links, gpu_memory_gib, gpu_peak_flops
from olmoe_train.planning.layout import FP32, ParallelLayout
from olmoe_train.planning.memory import MicroBatch, RankMemory, rank_memory
from olmoe_train.planning.memory_deepspeed import deepspeed_memory, host_memory, save_memory
from olmoe_train.planning.traffic import StepTraffic, step_traffic

MIB, GIB = 2**20, 2**30
MB, GB = 10**6, 10**9
LOAD_FACTORS = (1.0, 2.0, 4.0)
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Speed:
    """Speed and duration of a run at the given model FLOPs utilization."""

    flops_per_token: FlopsPerToken
    """FLOPs of forward and backward."""
    peak_flops: float
    """Peak FLOP/s of one GPU."""
    tokens_per_step: int
    """Tokens per optimizer step over all GPUs, after the batch-size warm-up."""
    micro_batches: int
    """Micro-batches per step and rank."""
    steps: int
    """Optimizer steps of the run."""
    tokens: int
    """Tokens of the run, padding included."""
    tokens_per_second: float
    """Tokens per second over all GPUs."""

    @property
    def seconds_per_step(self) -> float:
        """Duration of one step in seconds."""
        return self.tokens_per_step / self.tokens_per_second

    @property
    def days(self) -> float:
        """Duration of the run in days."""
        return self.tokens / self.tokens_per_second / SECONDS_PER_DAY


def plan_speed(cfg: PlanConfig) -> Speed:
    """The speed of a run: tokens/s = gpus x peak x MFU / FLOPs per token."""
    config, adapter = olmoe_config(cfg.model), adapter_spec(cfg.adapter)
    flops = train_flops_per_token(config, cfg.data.sequence_length, adapter)
    length = cfg.objective.sequences_per_sample * cfg.data.sequence_length
    peak, steps = gpu_peak_flops(cfg), total_steps(cfg.trainer, cfg.data.sequence_length)
    sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
    return Speed(
        flops,
        peak,
        cfg.trainer.global_batch_size * length,
        cfg.trainer.global_batch_size // (cfg.trainer.micro_batch_size * cfg.gpus),
        steps,
        int(sizes.tokens_after(steps)) * cfg.objective.sequences_per_sample,
        cfg.gpus * peak * cfg.mfu / flops.total,
    )


def plan_layout(cfg: PlanConfig) -> ParallelLayout:
    """The layout of the configuration's section `parallel`."""
    parallel = cfg.parallel
    return ParallelLayout(
        parallel.strategy,
        cfg.gpus,
        parallel.expert_parallel_size,
        parallel.replicate_size,
        parallel.zero_stage,
        parallel.offload,
        parallel.reshard_after_forward,
        parallel.prefetch,
    )


def plan_micro_batch(cfg: PlanConfig) -> MicroBatch:
    """The micro-batch of the configuration's sections `trainer` and `data`."""
    trainer = cfg.trainer
    return MicroBatch(
        trainer.micro_batch_size * cfg.objective.sequences_per_sample,
        cfg.data.sequence_length,
        trainer.precision,
        trainer.activation_checkpointing,
    )


def plan_memory(cfg: PlanConfig, layout: ParallelLayout, batch: MicroBatch) -> list[RankMemory]:
    """The memory of one rank at each load factor; only at load factor 1 without expert parallelism."""
    config = olmoe_config(cfg.model)
    factors = LOAD_FACTORS if layout.expert_parallel_size > 1 else LOAD_FACTORS[:1]
    adapter, batches = adapter_plan(cfg.adapter), [replace(batch, load_factor=factor) for factor in factors]
    if layout.strategy is Strategy.deepspeed:
        return [deepspeed_memory(config, layout, batch, adapter) for batch in batches]
    averaged, fused = cfg.trainer.ema_decay is not None, cfg.trainer.fused_backward
    return [rank_memory(config, layout, batch, adapter, cfg.optimizer, averaged, fused) for batch in batches]


def reference_memory(cfg: PlanConfig, layout: ParallelLayout, batch: MicroBatch) -> int:
    """Bytes per rank of the second model of objective.reference=live, in the precision of the computation."""
    objective = cfg.objective
    is_live = isinstance(objective, PreferenceConfig) and objective.reference_kind is Reference.live
    if not is_live or adapter_plan(cfg.adapter) is not None:
        return 0
    if layout.strategy is Strategy.deepspeed:
        layout = ParallelLayout(Strategy.fsdp, layout.gpus, layout.expert_parallel_size)
    return rank_memory(olmoe_config(cfg.model), layout, batch).parameters * batch.element // FP32


IsValid = Callable[[PlanConfig], bool]
"""Whether `olmoe train` would accept a configuration on cfg.gpus ranks."""


def possible_layouts(cfg: PlanConfig, is_valid: IsValid) -> list[ParallelLayout]:
    """The layouts of the GPUs that `olmoe train` accepts.

    Every strategy is tried with every expert-parallel size: fsdp with every number of copies, ddp, and
    deepspeed with every stage from 1, and with offloading for ZeRO-3.
    """
    divisors = [n for n in range(1, cfg.gpus + 1) if cfg.gpus % n == 0]
    sizes = [n for n in divisors if cfg.model.num_experts % n == 0]
    candidates = [
        ParallelLayout(Strategy.fsdp, cfg.gpus, size, copies) for copies in divisors for size in sizes
    ]
    candidates += [ParallelLayout(Strategy.ddp, cfg.gpus, size) for size in sizes]
    kinds = [(stage, Offload.none) for stage in (1, 2, 3)] + [(3, Offload.optimizer), (3, Offload.parameters)]
    candidates += [
        ParallelLayout(Strategy.deepspeed, cfg.gpus, size, 1, *kind) for kind in kinds for size in sizes
    ]
    gathering = {name: getattr(cfg.parallel, name) for name in ("reshard_after_forward", "prefetch")}
    return [replace(layout, **gathering) for layout in candidates if _is_accepted(cfg, layout, is_valid)]


def _is_accepted(
    cfg: PlanConfig,
    layout: ParallelLayout,
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


def largest_micro_batch(cfg: PlanConfig, layout: ParallelLayout, batch: MicroBatch) -> int:
    """The most sequences per micro-batch that fit at load factor 1, a power of two that divides the batch; 0:
    a single sequence does not fit."""
    most, sequences = 0, 1
    common = math.gcd(*BatchSizes.of(cfg.trainer, cfg.data.sequence_length).all)
    while common % (sequences * cfg.gpus) == 0:
        if not fits(cfg, plan_memory(cfg, layout, replace(batch, sequences=sequences))[0]):
            break
        most, sequences = sequences, 2 * sequences
    return most


def fits(cfg: PlanConfig, memory: RankMemory) -> bool:
    """Whether the memory fits in a GPU, less the reserve."""
    return memory.total <= (gpu_memory_gib(cfg) - cfg.reserve_gib) * GIB


def run_lines(cfg: PlanConfig) -> list[str]:
    """Lines with model, step, speed and duration."""
    counts, speed = parameter_counts(olmoe_config(cfg.model)), plan_speed(cfg)
    flops = speed.flops_per_token
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value / 1e9:.4g}"
        for name, value in vars(flops).items()
        if name != "adapter" or value
    )
    sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
    length, tokens, rate = cfg.data.sequence_length, speed.tokens_per_step, speed.tokens_per_second
    time = f"{speed.days:,.1f} days" if speed.days >= 1 else f"{24 * speed.days:.2f} hours"
    rows = {
        "parameters": f"{counts.total:,}; {counts.active:,} active per token",
        "per token": f"{flops.total / 1e9:.4g} GFLOP in forward and backward: {parts}",
        "per step": f"{tokens // length:,} sequences x {length:,} = {tokens:,} tokens; GPUs x "
        f"micro-batches x sequences: {cfg.gpus:,} x {speed.micro_batches:,} x "
        f"{plan_micro_batch(cfg).sequences}",
        "speed": f"{rate:,.0f} tokens/s ({rate / cfg.gpus:,.0f} per GPU), "
        f"{speed.seconds_per_step:.2f} s per step, at mfu {cfg.mfu:.1%} of "
        f"{speed.peak_flops / 1e12:,.1f} TFLOP/s per GPU",
        "run": f"{speed.steps:,} steps, {speed.tokens:,} tokens: {time}",
        "schedule": schedule_in_words(cfg.scheduler, sizes, speed.steps),
    }
    if sizes.warmup:
        rows["batch size"] = f"in sequences: {sizes.in_words()}"
    if cfg.data.stages:
        rows["stages"] = _stages_in_words(cfg, sizes)
    if (adapter := adapter_plan(cfg.adapter)) is not None:
        of_adapter = adapter_counts(olmoe_config(cfg.model), adapter)
        rows = {"parameters": rows.pop("parameters"), "adapter": f"{cfg.adapter.name}: {of_adapter}"} | rows
    return [f"{name:<12}{text}" for name, text in rows.items()]


def _stages_in_words(cfg: PlanConfig, sizes: BatchSizes) -> str:
    """The sources of data.stages, with the steps at which each stage ends."""
    parts = []
    for stage in data_stages(cfg.data):
        shares = stage.requested_shares()
        names = ", ".join(name if len(shares) == 1 else f"{name} {part:.1%}" for name, part in shares.items())
        end = "" if stage.until is None else sizes.step_of_tokens(stage.until * cfg.data.sequence_length)
        parts.append(f"{names} to step {end:,.10g}" if end else names)
    return ", then ".join(parts)


def memory_lines(cfg: PlanConfig) -> list[str]:
    """Lines with the memory of the configured layout, part by part."""
    layout, batch = plan_layout(cfg), plan_micro_batch(cfg)
    memories = plan_memory(cfg, layout, batch)
    name, unit = _unit(memories[0])
    title = f"memory of the fullest rank in {name}: {describe(layout)}, {batch.precision.value}"
    tokens = f"micro-batch {batch.sequences} x {batch.sequence_length:,}"
    lines = [f"{title}, {tokens}, activation checkpointing {batch.checkpointing.value}"]
    if len(memories) > 1:
        lines.append("load: rows that the experts of the rank receive, as a multiple of the mean over ranks")
        lines.append(f"  {'':<16}" + "".join(f"{f'load {factor:.0f}x':>10}" for factor in LOAD_FACTORS))
    for part in [item.name for item in fields(RankMemory)] + ["total"]:
        if part == "quantized" and not memories[0].quantized:
            continue
        values = "".join(f"{getattr(memory, part) / unit:10.2f}" for memory in memories)
        lines.append(f"  {part.replace('_', '-'):<16}{values}")
    fitting = "".join(f"{'yes' if fits(cfg, memory) else 'no':>10}" for memory in memories)
    lines.append(f"  {'fits ' + _room(cfg):<16}{fitting}")
    if reference := reference_memory(cfg, layout, batch):
        lines.append(f"  for objective.reference=live, not in the total: {reference / unit:.2f} {name}")
    config, adapter = olmoe_config(cfg.model), adapter_plan(cfg.adapter)
    if host := host_memory(config, layout, batch, adapter):
        lines.append(f"  offloaded to the CPU: {host / unit:.2f} {name} per GPU")
    if cfg.checkpoint.async_save and layout.strategy is not Strategy.deepspeed:
        # Trained weights in fp32, which are as large as their gradients, and the optimizer's state.
        copied = memories[0].gradients + memories[0].optimizer
        lines.append(f"  copied to the CPU for checkpoint.async_save: {copied / unit:.2f} {name} per GPU")
    if layout.strategy is Strategy.deepspeed:
        copied = save_memory(config, layout, adapter)
        lines.append(f"  copied to the CPU for every save: {copied / unit:.2f} {name} per GPU")
    most = [
        f"{mode.value} {largest_micro_batch(cfg, layout, replace(batch, checkpointing=mode))}"
        for mode in ActivationCheckpointing
    ]
    lines.append(f"  most sequences per micro-batch, by activation checkpointing: {', '.join(most)}")
    return lines


def traffic_lines(cfg: PlanConfig) -> list[str]:
    """Lines with the traffic of the configured layout per step and rank, by collective and link."""
    layout, links = plan_layout(cfg), gpu_links(cfg)
    if layout.strategy is Strategy.deepspeed:
        return ["traffic between GPUs: not estimated for parallel.strategy=deepspeed"]
    if cfg.gpus == 1:
        return ["traffic between GPUs: none, with one GPU"]
    speed = plan_speed(cfg)
    batch, adapter = plan_micro_batch(cfg), adapter_plan(cfg.adapter)
    step = step_traffic(olmoe_config(cfg.model), layout, batch, speed.micro_batches, links, adapter)
    rows = {item.name.replace("_", "-"): getattr(step, item.name) for item in fields(StepTraffic)}
    largest = max(traffic.bytes_sent for traffic in rows.values())
    name, unit = ("GB", GB) if largest >= GB else ("MB", MB)
    lines = [
        f"traffic of one GPU per step in {name}: {describe(layout)}, {links.gpus_per_node} per node",
        "sent: to other GPUs; NVLink: over the GPU's link inside its node; network: over its network card",
        "(a node receives weights once and passes them on to its GPUs: both may carry the same bytes)",
        f"  {'':<16}{'sent':>10}{'NVLink':>10}{'network':>10}{'seconds >=':>12}",
    ]
    for kind, traffic in rows.items():
        sizes = (traffic.bytes_sent, traffic.node_bytes, traffic.network_bytes)
        lines.append(
            f"  {kind:<16}{''.join(f'{size / unit:10.2f}' for size in sizes)}{traffic.seconds:12.3g}"
        )
    bandwidths = f"{links.nvlink / GB:g} GB/s (NVLink) and {links.network / GB:g} GB/s (network)"
    lines.append(f"  links, per GPU and direction: {bandwidths}")
    lines.append(
        f"  a step takes {speed.seconds_per_step:.3g} s at mfu {cfg.mfu:.1%}; the links need at least"
    )
    lines.append(
        f"  {step.weights_seconds:.3g} s for weights and gradients, overlapping with computation, and"
    )
    lines.append(f"  {step.all_to_all.seconds:.3g} s for the all-to-all, during which computation waits")
    return lines


def layout_lines(cfg: PlanConfig, is_valid: IsValid) -> list[str]:
    """Lines with the total memory of every layout that `olmoe train` accepts."""
    batch = plan_micro_batch(cfg)
    name, unit = _unit(plan_memory(cfg, plan_layout(cfg), batch)[0])
    modes = "".join(f"{mode.value:>17}" for mode in ActivationCheckpointing)
    lines = [
        f"all layouts of {cfg.gpus:,} GPUs: {name} at load 1x by activation checkpointing; whether they fit",
        "(to 2x: they fit up to this load; state: parameters, gradients and optimizer)",
        f"  {'strategy':<20}{'expert_parallel_size':>21}{'replicate_size':>15}{'state':>9}{modes}",
    ]
    for layout in possible_layouts(cfg, is_valid):
        cells, state = "", 0
        for mode in ActivationCheckpointing:
            memories = plan_memory(cfg, layout, replace(batch, checkpointing=mode))
            state = memories[0].state
            if not _is_accepted(cfg, layout, is_valid, mode):
                cells += f"{'refused':>9}{'':8}"
                continue
            cells += f"{memories[0].total / unit:9.1f} {_fits_to(cfg, memories):<7}"
        here = "<- this configuration" if layout == plan_layout(cfg) else ""
        lines.append(
            f"  {_strategy(layout):<20}{layout.expert_parallel_size:>21}{layout.replicate_size:>15}"
            f"{state / unit:9.1f}{cells}{here}".rstrip()
        )
    return lines


def describe(layout: ParallelLayout) -> str:
    """A layout in words, for a title."""
    copies = f", {layout.replicate_size} copies" if layout.replicate_size > 1 else ""
    expert_parallel = f"expert parallel {layout.expert_parallel_size}"
    return f"{_strategy(layout)}{copies}, {expert_parallel}, {layout.gpus:,} GPUs"


def _strategy(layout: ParallelLayout) -> str:
    if layout.strategy is not Strategy.deepspeed:
        return layout.strategy.value
    offloaded = "" if layout.offload is Offload.none else f", {layout.offload.value} off"
    return f"ZeRO-{layout.zero_stage}{offloaded}"


def _unit(memory: RankMemory) -> tuple[str, int]:
    """The unit in which a memory's bytes are printed: its name, and its bytes."""
    return ("GiB", GIB) if memory.total >= GIB else ("MiB", MIB)


def _room(cfg: PlanConfig) -> str:
    """Memory of a GPU less the reserve, in GiB, as text."""
    return f"{gpu_memory_gib(cfg):g} - {cfg.reserve_gib:g}"


def _fits_to(cfg: PlanConfig, memories: list[RankMemory]) -> str:
    """Whether the memories fit: yes, no, or the load factor up to which they do."""
    fitting = [factor for factor, memory in zip(LOAD_FACTORS, memories, strict=False) if fits(cfg, memory)]
    if len(fitting) == len(memories):
        return "yes"
    return f"to {fitting[-1]:.0f}x" if fitting else "no"
