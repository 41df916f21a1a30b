"""The network between hosts, one link at a time, so that a slow one is named."""

import socket
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist

from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.training.preflight.machine.result import KIB, MIB, Result, Site, State

FIRST_BYTES, LARGEST_BYTES, ENOUGH_S = 256 * KIB, 64 * MIB, 0.1
"""A message is twice as long as the one before, until it is the largest or takes ENOUGH_S seconds."""
SLOW_BYTES_PER_S, SLOW_SHARE = 1e9 / 8, 1 / 3
"""A link is slow below 1 Gbit/s, and below a third of the median link."""
FIX = (
    "look at the interface that is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO), the speed "
    "that it has negotiated (`ethtool`), its errors (`ip -s link`), and the port of the switch"
)


def links(site: Site) -> list[Result]:
    """The rate from each host to the next one, the last one to the first. Collective; on rank 0."""
    places = gather_from_all(lambda: (site.local_rank, socket.gethostname()))
    firsts = [rank for rank, (local_rank, _) in enumerate(places) if local_rank == 0]
    if reason := "one host" if len(firsts) == 1 else "" if site.bandwidth_seconds else "bandwidth_seconds=0":
        return [] if site.rank else [Result("links", State.skipped, reason)]
    pairs = list(zip(firsts, [*firsts[1:], firsts[0]], strict=True))
    rates = {}
    for source, target in pairs:
        measure = partial(_rate, site, source, target) if site.rank in (source, target) else float
        rates[source, target] = gather_from_all(measure)[source]
    named = {f"{places[source][1]} to {places[target][1]}": rate for (source, target), rate in rates.items()}
    return [] if site.rank else [link_result(named)]


def _rate(site: Site, source: int, target: int) -> float:
    """Bytes per second that `source` sends, until `target` has answered; 0 on `target`."""
    size, flag = FIRST_BYTES, torch.zeros(1, device=site.device)
    is_connected = False
    while True:
        message = torch.zeros(size // 4, device=site.device)  # fp32
        if site.rank == target:
            dist.recv(message, source)
            dist.send(flag, source)
            dist.recv(flag, source)
            if flag.item():
                return 0.0
        else:
            started = time.perf_counter()
            dist.send(message, target)
            dist.recv(flag, target)
            flag.item()  # on a GPU, waits for it
            took = time.perf_counter() - started
            is_last = is_connected and (took > ENOUGH_S or size >= LARGEST_BYTES)
            flag.fill_(float(is_last))
            dist.send(flag, target)
            if is_last:
                return size / took
        size *= 2 if is_connected else 1
        is_connected = True  # by the first message, which is not timed


def link_result(rates: dict[str, float]) -> Result:
    """Compare the links. rates: bytes per second of each, by name."""
    median = statistics.median(rates.values())
    slow = {
        name: rate for name, rate in rates.items() if rate < SLOW_BYTES_PER_S or rate < SLOW_SHARE * median
    }
    values = {f"{name.replace(' ', '_')}_bytes_per_second": rate for name, rate in rates.items()}
    if not slow:
        name = min(rates, key=rates.__getitem__)
        what = f"the slowest of {len(rates)} links is {name}: {rates[name] / 1e9:.3g} GB/s"
        return Result("links", State.ok, what, values=values)
    what = "; ".join(f"{name}: {rate / 1e6:,.3g} MB/s" for name, rate in slow.items())
    what += f"; the median link has {median / 1e6:,.3g} MB/s, and Ethernet of 1 Gbit/s 125 MB/s"
    return Result("links", State.warning, f"slow: {what}", FIX, values)
