"""Parts of benchmarks/on_gpu.py: speed against Transformers and sonic-moe, memory, profile."""

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_kernels import now
from benchmarks.gpu_layouts import compiler_of
from benchmarks.gpu_models import (
    RESERVE,
    build,
    fields,
    fitting_layers,
    free_memory,
    our_loss,
    random_ids,
    transformers_twin,
)
from benchmarks.gpu_rows import Report, Skip
from benchmarks.gpu_step import (
    check_host_syncs,
    compare_steps,
    expert_layer_flops,
    flops_per_token,
    peak_of,
    time_expert_layer,
    tokens_per_second,
    variants,
)
from benchmarks.gpu_yardstick import build_engine, loss_of_engine
from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.train import TrainerConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.live_memory import LiveBytes
from olmoe_train.planning.memory import MicroBatch, rank_memory

GIB = 2**30
TOP_KERNELS = 15
LONG_GAP = 20.0
"""Microseconds without a kernel that count as a gap of the host: a launch takes some 5."""


def host_syncs(args: argparse.Namespace, report: Report) -> None:
    """No read of the device in forward, losses and backward."""
    if args.device == "cpu":
        raise Skip("CUDA reports them; a CPU has none")
    check_host_syncs(args, build(args, min(2, args.layers or 2)))
    report.check("host syncs in forward, losses and backward", 0.0, 0.0)


def expert_layer(args: argparse.Namespace, report: Report) -> None:
    """Router and experts of one layer, forward and backward."""
    model = build(args, 1)
    seconds = time_expert_layer(args, model, transformers_twin(model, args))
    for name, value in seconds.items():
        report.measure(name, 1e3 * value, "ms")
        _rates(args, report, name, expert_layer_flops(args) / value, seconds[name], seconds)
    _left_out(args, report, "transformers" in seconds)


def step(args: argparse.Namespace, report: Report) -> None:
    """The whole step of every variant in turn: tokens/s, share of the peak, memory, ratio to Transformers."""
    layers = fitting_layers(args)
    model = build(args, layers)
    with compiler_of(args):
        _, models, losses = variants(args, model)
        times, peaks = compare_steps(args, models, losses)
    for count, timed in times.items():
        title = f"{count} layers" + ("" if count == layers else ", computed")
        speeds = tokens_per_second(args, timed)
        for name, speed in speeds.items():
            what = f"{title}: {name}"
            report.measure(what, speed, "tokens/s")
            seconds = {other: 1 / value for other, value in speeds.items()}
            _rates(args, report, what, flops_per_token(args, count) * speed, 1 / speed, seconds)
    for name, peak in peaks.items():
        if peak is None:
            report.skip(f"{name}: peak memory", "CUDA's allocator counts it")
        else:
            report.measure(f"{name}: peak memory of a pass", peak, "GiB")
    _left_out(args, report, "transformers" in losses)


def _rates(
    args: argparse.Namespace,
    report: Report,
    what: str,
    flops: float,
    seconds: float,
    of_all: dict[str, float],
) -> None:
    if (peak := peak_of(args)) is not None:
        report.measure(f"{what}: share of the peak", flops / peak)
    for other in ("transformers", "ours, sonicmoe"):
        if other in of_all and seconds != of_all[other]:
            report.measure(f"{what}: speed / {other}", of_all[other] / seconds)


def _left_out(args: argparse.Namespace, report: Report, with_transformers: bool) -> None:
    if not with_transformers:
        report.skip("ratio to transformers", "no transformers")
    for name, reason in args.left_out.items():
        report.skip(f"ratio to {name}", reason)


# --- memory -----------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace, report: Report) -> None:
    """The peak of a trainer's step against what `olmoe plan` says, with FSDP2 on one rank: fp32 masters and
    moments, 16 bytes per parameter, so fewer layers than the part `step`."""
    for mode in ActivationCheckpointing:
        free_memory(args)
        layers = _planned_layers(args, mode)
        planned = _planned(args, layers, mode)
        measured = _measured(args, layers, mode)
        what = f"{layers} layers, {mode.value}"
        report.measure(f"{what}: measured", measured / GIB, "GiB")
        report.measure(f"{what}: planned", planned / GIB, "GiB")
        report.measure(f"{what}: planned / measured", planned / measured)


def _planned(args: argparse.Namespace, layers: int, mode: ActivationCheckpointing) -> int:
    batch = MicroBatch(args.micro_batch, args.sequence, Precision.bf16, mode)
    return rank_memory(
        OlmoeConfig(**fields(args, layers)), ParallelLayout(Strategy.fsdp, gpus=1), batch
    ).total


def _planned_layers(args: argparse.Namespace, mode: ActivationCheckpointing) -> int:
    """The most of 16 layers that the plan says fit; at least 1."""
    if args.layers is not None or args.device == "cpu":
        return args.layers or 2
    free = torch.cuda.mem_get_info()[0] - RESERVE
    return max([1, *(count for count in range(1, 17) if _planned(args, count, mode) <= free)])


def _measured(args: argparse.Namespace, layers: int, mode: ActivationCheckpointing) -> int:
    """Bytes at the peak of the second of two steps of two micro-batches each."""
    trainer = TrainerConfig(precision=Precision.bf16, activation_checkpointing=mode)
    weights = {name: p.detach() for name, p in build(args, layers).named_parameters()}
    weights = {name: value.cpu() for name, value in weights.items()}  # what is measured is the engine alone
    engine = build_engine(args, weights, trainer, layers=layers)
    del weights

    def steps(count: int, reset: Callable[[], Any]) -> None:
        for number in range(count):
            if number == count - 1:
                reset()
            for last in (False, True):
                engine.backward(loss_of_engine(engine, random_ids(args, args.micro_batch)), last)
            engine.step(lambda norm: ~torch.isfinite(norm))

    if args.device == "cpu":
        with LiveBytes(engine.model.parameters()) as live:
            steps(2, lambda: setattr(live, "peak", 0))
        return live.peak
    steps(2, torch.cuda.reset_peak_memory_stats)
    return torch.cuda.max_memory_allocated()


# --- profile ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, or a copy, on the device; microseconds."""

    name: str
    start: float
    end: float


def idle_between(kernels: list[Kernel]) -> list[float]:
    """Microseconds from the end of all earlier kernels to the next one, where nothing runs."""
    gaps, busy_until = [], None
    for kernel in sorted(kernels, key=lambda one: one.start):
        if busy_until is not None and kernel.start > busy_until:
            gaps.append(kernel.start - busy_until)
        busy_until = kernel.end if busy_until is None else max(busy_until, kernel.end)
    return gaps


def profile(args: argparse.Namespace, report: Report) -> None:
    """One step: the kernels that take the most time, and the time in which the GPU waits for the host."""
    model = build(args, fitting_layers(args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss = our_loss(model, args.backends[0])

    def one_step() -> None:
        loss(random_ids(args, args.micro_batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    one_step()
    activity = torch.profiler.ProfilerActivity
    on_cpu = args.device == "cpu"
    start = now(args)
    with torch.profiler.profile(
        activities=[activity.CPU] if on_cpu else [activity.CPU, activity.CUDA]
    ) as found:
        start = now(args)
        one_step()
        wall = now(args) - start
    print(found.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=60))
    report.measure("step under the profiler", 1e3 * wall, "ms")
    if on_cpu:
        events = [event for event in found.key_averages() if event.self_cpu_time_total > 0]
        _top(report, {event.key: event.self_cpu_time_total for event in events})
        report.skip("time between kernels", "a CPU runs operators one after the other")
        return
    device = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in found.events() or []
        if event.device_type == device
    ]
    totals: Counter[str] = Counter()
    for kernel in kernels:
        totals[kernel.name] += kernel.end - kernel.start  # type: ignore[assignment]
    _top(report, totals)
    gaps = idle_between(kernels)
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    report.measure("kernels", float(len(kernels)))
    report.measure("GPU idle between kernels", sum(gaps) / 1e3, "ms")
    report.measure("GPU idle, share of the step", sum(gaps) / span)
    long = [gap for gap in gaps if gap > LONG_GAP]
    report.measure(f"gaps over {LONG_GAP:.0f} us", float(len(long)))
    report.measure(f"gaps over {LONG_GAP:.0f} us, in all", sum(long) / 1e3, "ms")


def _top(report: Report, microseconds: dict[str, Any]) -> None:
    whole = sum(microseconds.values())
    for name in sorted(microseconds, key=lambda key: -microseconds[key])[:TOP_KERNELS]:
        report.measure(f"{name[:80]}: {microseconds[name] / whole:.1%}", microseconds[name] / 1e3, "ms")
