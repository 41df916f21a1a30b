"""Names stragglers: ranks that are late with their batches, or slow to compute.

A step's collectives make all ranks as slow as the slowest rank. So each rank times what it does without the
others: waiting for its batches, and the output layer (forward pass and gradients), which is the same work on
all ranks and waits for nobody. Both take longer on a throttled or shared processor.
"""

import logging
import statistics
import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

log = logging.getLogger(__name__)
LATE, LATE_SHARE = 3.0, 0.2
"""A rank is late if it waits for batches LATE times as long as the median rank and LATE_SHARE of the time."""
SLOW = 1.5
"""A rank is slow if its output layer takes SLOW times as long as the median rank's."""
WINDOW, ENOUGH = 32, 8
"""Micro-batches whose median counts for a rank, and the fewest that count."""
Moment = float | torch.cuda.Event


class StragglerDetector:
    """Times this rank; `warn` compares the ranks' times."""

    def __init__(self, peers: list[tuple[str, int]], head: nn.Module, device: torch.device) -> None:
        """
        Args:
            peers: (host, process) of each rank.
            head: the output layer, as training calls it.
        """
        self.peers, self.device = peers, device
        self._waited, self._asked = 0.0, time.monotonic()
        self._spans: deque[tuple[Moment, Moment]] = deque(maxlen=WINDOW)
        self._started: Moment = 0.0
        self._late: set[int] = set()
        self._slow: set[int] = set()
        head.register_forward_pre_hook(self._start)
        head.register_forward_hook(self._end)

    def warn(self, seconds_waited: float) -> list[tuple[int, str]]:
        """Warn of stragglers since the last call; collective. On CUDA, call it after a synchronization.

        seconds_waited: for batches, since the run started on this rank. Returns (rank, warning) of each rank
        that is warned of, the same on every rank.
        """
        elapsed, spans = time.monotonic() - self._asked, [_seconds(*span) for span in self._spans]
        computing = statistics.median(spans) if len(spans) >= ENOUGH else 0.0
        mine = torch.tensor([seconds_waited - self._waited, computing], dtype=torch.float64)
        self._asked, self._waited = time.monotonic(), seconds_waited
        gathered = [torch.zeros_like(mine) for _ in self.peers]
        dist.all_gather(gathered, mine)
        waits, computes = torch.stack(gathered, dim=1)
        found = []
        late = _beyond(waits, max(LATE * waits.median().item(), LATE_SHARE * elapsed))
        for rank in late - self._late:
            text = "%s is late: it waited %.1f of the last %.1f s for its batches"
            found.append((rank, text % (self._name(rank), waits[rank], elapsed)))
        usual = computes.median().item()
        slow = _beyond(computes, SLOW * usual) if usual else set()
        for rank in slow - self._slow:
            text = "%s computes slowly: the output layer takes it %.2f ms, the median rank %.2f ms"
            found.append((rank, text % (self._name(rank), 1e3 * computes[rank], 1e3 * usual)))
        for _, said in found:
            log.warning("WARNING: %s", said)
        self._late, self._slow = late, slow  # warned of once, until it is over
        return found

    def _name(self, rank: int) -> str:
        host, pid = self.peers[rank]
        return f"rank {rank} (host {host}, process {pid})"

    def _now(self) -> Moment:
        """On CUDA an event in the stream: the host does not wait, the device notes the time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self, *_: Any) -> None:
        if torch.is_grad_enabled():  # validation has other batches, and no gradients
            self._started = self._now()

    def _end(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._spans.append((self._started, self._now()))


def _seconds(started: Moment, ended: Moment) -> float:
    if isinstance(started, float) or isinstance(ended, float):
        return ended - started  # type: ignore[operator]
    return started.elapsed_time(ended) / 1e3  # milliseconds


def _beyond(seconds: Tensor, limit: float) -> set[int]:
    return {rank for rank, taken in enumerate(seconds.tolist()) if taken > limit}
