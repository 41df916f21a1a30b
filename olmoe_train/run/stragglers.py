"""Names the ranks that every step waits for: late with their batches, or slow to compute.

A step's collectives make all ranks as slow as the slowest, so each times what it does alone: getting its
batches, and the output layer (forward pass and gradients), which is the same work on all ranks, a part of
every model, and waits for nobody. A rank on a throttled or shared processor takes longer for both.
"""

import logging
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

log = logging.getLogger("olmoe")
LATE, LATE_SHARE = 3.0, 0.2
"""Late: waits for batches for so many times as long as the median rank, and so much of the time."""
SLOW = 1.5
"""Slow: so many times as long as the median rank for the output layer, by the median of WINDOW."""
WINDOW, ENOUGH = 32, 8
"""Micro-batches that speak for a rank, and the fewest that do."""
Moment = float | torch.cuda.Event


class Pace:
    """This rank's times. `name_slow_ranks`, where the run logs, is the only place that compares them."""

    def __init__(self, peers: list[tuple[str, int]], head: nn.Module, device: torch.device) -> None:
        """peers: (host, process) of each rank. head: the output layer, as training calls it."""
        self.peers, self.device = peers, device
        self._waiting, self._asked = 0.0, time.monotonic()
        self._spans: deque[tuple[Moment, Moment]] = deque(maxlen=WINDOW)
        self._begun: Moment = 0.0
        self._late: set[int] = set()
        self._slow: set[int] = set()
        head.register_forward_pre_hook(self._begin)
        head.register_forward_hook(self._end)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around getting a step's batches."""
        started = time.monotonic()
        yield
        self._waiting += time.monotonic() - started

    def name_slow_ranks(self) -> None:
        """Warn of ranks that held the others up lately; collective. On CUDA, call it after what has waited
        for the device."""
        elapsed, spans = time.monotonic() - self._asked, [_seconds(*span) for span in self._spans]
        computing = statistics.median(spans) if len(spans) >= ENOUGH else 0.0
        own = torch.tensor([self._waiting, computing], dtype=torch.float64)
        self._asked, self._waiting = time.monotonic(), 0.0
        gathered = [torch.zeros_like(own) for _ in self.peers]
        dist.all_gather(gathered, own)
        waits, computes = torch.stack(gathered, dim=1)
        late = _beyond(waits, max(LATE * waits.median().item(), LATE_SHARE * elapsed))
        for rank in late - self._late:
            text = "WARNING: %s is late: it waited %.1f of the last %.1f s for its batches"
            log.warning(text, self._name(rank), waits[rank], elapsed)
        usual = computes.median().item()
        slow = _beyond(computes, SLOW * usual) if usual else set()
        for rank in slow - self._slow:
            text = "WARNING: %s computes slowly: the output layer takes it %.2f ms, the median rank %.2f ms"
            log.warning(text, self._name(rank), 1e3 * computes[rank], 1e3 * usual)
        self._late, self._slow = late, slow  # said once, until it is over

    def _name(self, rank: int) -> str:
        host, pid = self.peers[rank]
        return f"rank {rank} (host {host}, process {pid})"

    def _now(self) -> Moment:
        """On CUDA a mark in the stream: the host goes on, the device notes the time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: Any) -> None:
        if torch.is_grad_enabled():  # validation has other batches, and no gradients
            self._begun = self._now()

    def _end(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._spans.append((self._begun, self._now()))


def _seconds(begun: Moment, ended: Moment) -> float:
    if isinstance(begun, float) or isinstance(ended, float):
        return ended - begun  # type: ignore[operator]
    return begun.elapsed_time(ended) / 1e3  # milliseconds


def _beyond(seconds: Tensor, limit: float) -> set[int]:
    return {rank for rank, taken in enumerate(seconds.tolist()) if taken > limit}
