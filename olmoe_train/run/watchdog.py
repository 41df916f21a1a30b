"""Ends a run that does not get on, with the rank that holds it up and every rank's stack in the log.

A collective waits for its slowest rank, so when one rank hangs all do. A thread of each rank notices, writes
where its rank stands to run_dir/stalled/, which all nodes share, and leaves; one of them makes the report.
"""

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

log = logging.getLogger(__name__)
POLL_S, WORDS_S = 0.5, 2.0
"""Between looks, and how long to wait for the other ranks' words."""
FRAMES = 12
RANKS = "ranks.json"
PF_EXITING = 0x4  # linux/sched.h, of the flags in /proc/PID/stat
Item = TypeVar("Item")


class Watchdog:
    """Watches this rank's main thread from construction to `close`; collective."""

    def __init__(self, run_dir: Path, timeout: float, give_up: Callable[[str], None]) -> None:
        """timeout: seconds between two beats. give_up: called on one rank with the reason of the end."""
        self.directory, self.timeout, self.give_up = run_dir / "stalled", timeout, give_up
        self.peers: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(self.peers, (socket.gethostname(), os.getpid()))
        if dist.get_rank() == 0:
            (run_dir / RANKS).write_text(json.dumps(self.peers), encoding="utf-8")
        self.rank, self.launcher = dist.get_rank(), os.getppid()
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self.heartbeat("starting")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def heartbeat(self, where: str) -> None:
        """The rank got as far as `where`."""
        self.where, self.beaten = where, time.monotonic()

    def with_heartbeat(self, items: Iterable[Item], where: str = "validating") -> Iterator[Item]:
        """The items, with a beat at each."""
        for item in items:
            self.heartbeat(where)
            yield item

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            # A rank stuck outside of Python never gets here again: this one is C, and needs no turn.
            # __stderr__: a notebook's or a test's stderr may have no file descriptor for it to write to.
            limit = self.timeout + POLL_S + WORDS_S
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__ or sys.stderr)
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.launcher:
                os._exit(1)  # torchrun is gone, and with it whoever could stop or restart this rank
            if self.directory.is_dir() or time.monotonic() - self.beaten > self.timeout:
                self._leave()
            if gone := ended_ranks(self.peers):
                time.sleep(WORDS_S)  # a collective that has noticed raises, and the run ends by itself
                if not self._closed.is_set():
                    self.give_up(gone)
                    os._exit(1)

    def _leave(self) -> None:
        self.directory.mkdir(exist_ok=True)
        words = self.directory / f".rank-{self.rank:05d}"
        words.write_text(self._words(), encoding="utf-8")
        words.rename(self.directory / words.name[1:])
        until = time.monotonic() + WORDS_S
        while len(self._heard()) < len(self.peers) and time.monotonic() < until:
            time.sleep(POLL_S / 5)
        if self.rank == min(self._heard()):
            self.give_up(self._report())
            self._end_the_silent()
        else:
            time.sleep(POLL_S)  # torchrun ends every rank when one leaves
        os._exit(1)

    def _words(self) -> str:
        """First line: where this rank stands, and whether it waits for others; then the stack."""
        frames = traceback.extract_stack(sys._current_frames()[self._main or 0])[-FRAMES:]
        waiting = any("/torch/distributed/" in frame.filename for frame in frames[-3:])
        at = f"{frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
        doing = "waits for other ranks in" if waiting else "is in"
        return f"{self.where}: {doing} {at}\n" + "".join(traceback.format_list(frames))

    def _heard(self) -> dict[int, str]:
        return {
            int(path.name.removeprefix("rank-")): path.read_text(encoding="utf-8")
            for path in self.directory.glob("rank-*")
        }

    def _report(self) -> str:
        """Logs every rank's stack; the reason in a sentence."""
        heard, suspects = self._heard(), []
        for rank, (host, pid) in enumerate(self.peers):
            text = heard.get(rank, "does not answer: dead, frozen, or stuck outside of Python\n")
            log.error("rank %d (host %s, process %d): %s", rank, host, pid, text.rstrip())
            first = text.splitlines()[0]
            if "waits for other ranks" not in first:
                suspects.append(f"rank {rank} (host {host}, process {pid}), {first}")
        if not suspects:
            suspects = ["all ranks wait for each other; the stacks are in the log"]
        return f"no progress for trainer.timeout={self.timeout:g} s. Held up by {'; '.join(suspects)}"

    def _end_the_silent(self) -> None:
        """What does not answer would not hear torchrun's SIGTERM either."""
        for rank in set(range(len(self.peers))) - self._heard().keys():
            host, pid = self.peers[rank]
            if host == socket.gethostname() and not _ended(pid):
                os.kill(pid, signal.SIGKILL)


def ranks_of(run_dir: Path) -> list[tuple[str, int]]:
    """(host, process) of each rank of the last run that started in this directory."""
    path = run_dir / RANKS
    return [(host, pid) for host, pid in json.loads(path.read_text())] if path.is_file() else []


def ended_ranks(ranks: list[tuple[str, int]]) -> str:
    """Those on this host whose process is no more, in words; empty if there is none."""
    gone = [
        f"rank {rank} (host {host}, process {pid})"
        for rank, (host, pid) in enumerate(ranks)
        if host == socket.gethostname() and _ended(pid)
    ]
    return f"{', '.join(gone)} died" if gone else ""


def _ended(pid: int) -> bool:
    """Whether a process of this host has ended, waited for by its parent or not, or is about to: its sockets
    close, and its peers notice, before it counts as dead (Linux; elsewhere False)."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return state in "ZX" or bool(int(numbers[5]) & PF_EXITING)
    except FileNotFoundError:
        return Path("/proc/self").exists()
