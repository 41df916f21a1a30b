"""Measured bandwidth of the collectives of a run, and the time per step of the run's traffic at it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.choices import Strategy
from olmoe_train.config.model import olmoe_config
from olmoe_train.distributed.mesh import Mesh, build_mesh
from olmoe_train.planning.adapter import adapter_plan
from olmoe_train.planning.flops import peak_flops
from olmoe_train.planning.report import plan_layout, plan_micro_batch, plan_speed
from olmoe_train.planning.traffic import Links, StepTraffic, step_traffic
from olmoe_train.training.preflight.machine.gpus import plan_of
from olmoe_train.training.preflight.machine.result import KIB, MIB, Result, Site, State

FIRST_BYTES = 64 * KIB
LARGEST_BYTES = {"cuda": 512 * MIB, "cpu": 64 * MIB}
"""Of one rank's tensor. Larger ones do not raise the bandwidth."""
GB = 1e9


@dataclass(frozen=True)
class Collective:
    """One kind of collective, over the ranks that take part in it."""

    name: str
    group: dist.ProcessGroup
    run: Callable[[Tensor, Tensor], object]
    """Takes an input and an output of the same size."""
    sent_share: Callable[[int], float]
    """Bytes that a rank sends, as a multiple of the bytes of `whole`, for n ranks (planning/traffic.py)."""


def bandwidth(site: Site) -> list[Result]:
    """All-reduce, all-gather and all-to-all: GB/s that each rank sends, and time per step. Collective.

    Every collective is measured over the ranks that the layout uses it for, all groups at the same time. It
    is repeated with twice the bytes until its part of the time is over.
    """
    if site.world_size == 1:
        return [Result("bandwidth", State.skipped, "one rank")]
    if not site.bandwidth_seconds:
        return [Result("bandwidth", State.skipped, "bandwidth_seconds=0")]
    mesh = None if site.errors else build_mesh(site.cfg.parallel, site.device)
    kinds = collectives(mesh)
    seconds = site.bandwidth_seconds / len(kinds)
    measured = {kind.name: measure(kind, site.device, seconds) for kind in kinds}
    return [compare(site, measured)]


def collectives(mesh: Mesh | None) -> list[Collective]:
    """The collectives with the groups of a layout; with the group of all ranks where the layout has none, or
    without a layout."""
    groups = dict.fromkeys(("all_reduce", "all_gather", "all_to_all"), dist.group.WORLD)
    if mesh is not None:
        found = {"all_reduce": mesh.dense["replicate"], "all_gather": mesh.dense["shard"]}
        if mesh.expert is not None:
            found["all_to_all"] = mesh.expert["expert"]
        groups |= {name: one.get_group() for name, one in found.items() if one.size() > 1}
    runs: dict[str, Callable[..., object]] = {
        "all_reduce": _all_reduce,
        "all_gather": _all_gather,
        "all_to_all": _all_to_all,
    }
    shares = {"all_reduce": lambda n: 2 * (n - 1) / n}
    return [
        Collective(name, group, partial(runs[name], group), shares.get(name, lambda n: (n - 1) / n))
        for name, group in groups.items()
        if group is not None
    ]


def _all_reduce(group: dist.ProcessGroup, given: Tensor, out: Tensor) -> None:
    dist.all_reduce(given, group=group)


def _all_gather(group: dist.ProcessGroup, given: Tensor, out: Tensor) -> None:
    part = given.chunk(group.size())[group.rank()]
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
    gather(out[: part.numel() * group.size()], part, group=group)


def _all_to_all(group: dist.ProcessGroup, given: Tensor, out: Tensor) -> None:
    dist.all_to_all_single(out, given, group=group)


def measure(kind: Collective, device: torch.device, seconds: float) -> float:
    """Bytes per second that a rank sends to others, in the slowest group; that of the largest size, because
    what small ones send can be in buffers when they return.

    All ranks measure for about `seconds`, and at least one size.
    """
    ranks, size = kind.group.size(), FIRST_BYTES
    until = time.monotonic() + seconds
    while True:
        elements = size // 4 // ranks * ranks  # fp32, and equal parts for all ranks
        given, out = torch.zeros(elements, device=device), torch.zeros(elements, device=device)
        kind.run(given, out)  # connects, the first time
        took = slowest(partial(kind.run, given, out), device)
        # The next size takes up to twice as long, two times.
        is_over = time.monotonic() + 4 * took > until or size >= LARGEST_BYTES[device.type]
        if agree(is_over):
            return 4 * elements * kind.sent_share(ranks) / took
        size *= 2


def slowest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call on the slowest rank."""
    dist.all_reduce(torch.zeros(1))
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def agree(flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    count = torch.tensor(float(flag))
    dist.all_reduce(count)
    return bool(count)


def compare(site: Site, measured: dict[str, float]) -> Result:
    """The measured bandwidths, and the seconds per step of the run's traffic at them.

    A reduce-scatter sends what an all-gather sends, and is taken to be as fast.

    Args:
        site: This rank's site.
        measured: Bytes per second of each collective.
    """
    rates = ", ".join(f"{name.replace('_', '-')} {rate / GB:.3g} GB/s" for name, rate in measured.items())
    values = {f"{name}_bytes_per_second": rate for name, rate in measured.items()}
    if site.errors:
        return Result("bandwidth", State.ok, f"per rank: {rates}", values=values)
    if site.cfg.parallel.strategy is Strategy.deepspeed:
        what = f"per rank: {rates}; olmoe plan does not count the traffic of DeepSpeed"
        return Result("bandwidth", State.ok, what, values=values)
    plan = plan_of(site)
    speed, batch = plan_speed(plan), plan_micro_batch(plan)
    traffic = step_traffic(
        olmoe_config(plan.model),
        plan_layout(plan),
        batch,
        speed.micro_batches,
        Links(),
        adapter_plan(plan.adapter),
    )
    weights, tokens = seconds_per_step(traffic, measured)
    values |= {"weights_seconds_per_step": weights, "all_to_all_seconds_per_step": tokens}
    what = (
        f"per rank: {rates}. At these, a step sends weights and gradients for {weights:.3g} s, and tokens to "
        f"experts for {tokens:.3g} s; over the links of a DGX H100 {traffic.weights_seconds:.3g} and "
        f"{traffic.all_to_all.seconds:.3g} s"
    )
    peak = None
    if site.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(), site.cfg.trainer.precision.dtype)
    if peak is None:
        return Result("bandwidth", State.ok, what, values=values)
    flops = speed.flops_per_token.total * speed.tokens_per_step
    computes = flops / (site.world_size * peak * plan.mfu)
    values["compute_seconds_per_step"] = computes
    what += f"; it computes for {computes:.3g} s at mfu {plan.mfu:.1%}"
    if weights <= computes and tokens <= computes:
        return Result("bandwidth", State.ok, what, values=values)
    fix = (
        "links are slower than the run needs: look at NCCL_DEBUG=INFO for the network that NCCL uses; "
        "raise trainer.micro_batch_size, keep expert_parallel_size within a host, or raise replicate_size"
    )
    return Result("bandwidth", State.warning, what, fix, values)


def seconds_per_step(traffic: StepTraffic, measured: dict[str, float]) -> tuple[float, float]:
    """Time of a step's traffic at measured bandwidths: (of weights and gradients, of tokens).

    Args:
        traffic: What one rank sends in a step.
        measured: Bytes per second of each collective.
    """
    gathered = traffic.all_gather.bytes_sent + traffic.reduce_scatter.bytes_sent
    weights = gathered / measured["all_gather"] + traffic.all_reduce.bytes_sent / measured["all_reduce"]
    return weights, traffic.all_to_all.bytes_sent / measured["all_to_all"]
