"""End a run that makes no progress, and log the rank that blocks it and the stack of every rank.

A collective waits for its slowest rank, so all ranks hang when one rank hangs. A watchdog thread on each
rank detects a missing heartbeat. The thread writes the rank's position to run_dir/stalled/, which all nodes
share, and ends the process. One of the ranks writes the report; a rank of each other host prints the
reason.
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
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from olmoe_train.run.heartbeat import touch_heartbeat

log = logging.getLogger(__name__)
POLL_S, WORDS_S, PROBE_S = 0.5, 2.0, 3.0
"""Seconds between two checks; to wait for the other ranks' position files; and to wait for a connection."""
FRAMES = 12
RANKS = "ranks.json"
WAITS, CUT = "waits for other ranks", "has no connection to"
"""Phrases of a position, by which the report finds what held up the run."""
PF_EXITING = 0x4  # from linux/sched.h; a bit of the flags in /proc/PID/stat
Item = TypeVar("Item")


class Watchdog:
    """Watches this rank's main thread from construction to `close`. Construction is collective."""

    def __init__(self, run_dir: Path, timeout: float, give_up: Callable[[str], None]) -> None:
        """
        Args:
            run_dir: The run's directory, which all nodes share.
            timeout: Maximum number of seconds between two heartbeats.
            give_up: Called with the reason before this process exits. After a stall only one rank calls it.
        """
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
        """Record that the rank has reached `where`, a phrase for the report."""
        self.where, self.beaten = where, time.monotonic()
        touch_heartbeat()

    def with_heartbeat(self, items: Iterable[Item], where: str = "validating") -> Iterator[Item]:
        """Yield the items, with a heartbeat before each item."""
        for item in items:
            self.heartbeat(where)
            yield item

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            # A rank that is stuck outside of Python may never run this loop again. This timer is C code and
            # needs no Python thread. It writes to a file descriptor, which the stderr of a notebook or a test
            # may not have; hence __stderr__.
            limit = self.timeout + POLL_S + WORDS_S + PROBE_S
            faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__ or sys.stderr)
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.launcher:
                os._exit(1)  # torchrun has ended, so nothing can stop or restart this rank
            if self.directory.is_dir() or time.monotonic() - self.beaten > self.timeout:
                self._leave()
            if gone := ended_ranks(self.peers):
                time.sleep(WORDS_S)  # a collective may raise meanwhile, which ends the run
                if not self._closed.is_set():
                    self.give_up(gone)
                    os._exit(1)

    def _leave(self) -> None:
        self.directory.mkdir(exist_ok=True)
        words = self.directory / f".rank-{self.rank:05d}"
        words.write_text(self._words(), encoding="utf-8")
        words.rename(self.directory / words.name[1:])
        until = time.monotonic() + WORDS_S + PROBE_S  # another rank may still wait for a connection
        while len(self._heard()) < len(self.peers) and time.monotonic() < until:
            time.sleep(POLL_S / 5)
        heard, here = self._heard(), socket.gethostname()
        if self.rank == min(heard):
            self._log_stacks(heard)
            self.give_up(self._reason(heard))
            self._end_the_silent()
        elif self.rank == min(rank for rank in heard if self.peers[rank][0] == here):
            # Nothing else says on this host why its ranks have ended.
            with suppress(OSError):
                print(f"ERROR: {self._reason(heard)}", file=sys.__stderr__ or sys.stderr, flush=True)
        else:
            time.sleep(POLL_S)  # torchrun ends every rank when one rank exits
        os._exit(1)

    def _words(self) -> str:
        """Return the rank's position as one line, followed by the stack of its main thread.

        The first line also says whether the rank waits for other ranks, and whether it cannot reach rank 0.
        """
        frames = traceback.extract_stack(sys._current_frames()[self._main or 0])[-FRAMES:]
        waiting = any("/torch/distributed/" in frame.filename for frame in frames[-3:])
        at = f"{frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
        position = f"{self.where}: {WAITS if waiting else 'is'} in {at}"
        if waiting and (reason := self._cut_off()):
            position += f", and {CUT} rank 0 (host {self.peers[0][0]}): {reason}"
        return f"{position}\n" + "".join(traceback.format_list(frames))

    def _cut_off(self) -> str:
        """Why there is no way to the host of rank 0; empty: there is one, or none is known.

        The address is that of the store at which the ranks met.
        """
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if self.peers[0][0] == socket.gethostname() or host is None or port is None:
            return ""
        try:
            socket.create_connection((host, int(port)), PROBE_S).close()
        except ConnectionError:
            return ""  # the host answers that nobody is there
        except OSError as error:
            return f"{host}:{port}: {error.strerror or error}"
        return ""

    def _heard(self) -> dict[int, str]:
        return {
            int(path.name.removeprefix("rank-")): path.read_text(encoding="utf-8")
            for path in self.directory.glob("rank-*")
        }

    def _positions(self, heard: dict[int, str]) -> Iterator[tuple[str, str]]:
        """(name, position) of each rank."""
        silent = "does not answer: dead, frozen, stuck outside of Python, or on a host that is cut off"
        for rank, (host, pid) in enumerate(self.peers):
            yield f"rank {rank} (host {host}, process {pid})", heard.get(rank, silent)

    def _log_stacks(self, heard: dict[int, str]) -> None:
        for name, text in self._positions(heard):
            log.error("%s: %s", name, text.rstrip())

    def _reason(self, heard: dict[int, str]) -> str:
        """The reason for the stall in one sentence."""
        suspects = []
        for name, text in self._positions(heard):
            first = text.splitlines()[0]
            if WAITS not in first or CUT in first:
                suspects.append(f"{name}, {first}")
        if not suspects:
            suspects = ["all ranks wait for each other; the stacks are in the log"]
        return f"no progress for trainer.timeout={self.timeout:g} s. Held up by {'; '.join(suspects)}"

    def _end_the_silent(self) -> None:
        """Kill the ranks of this host that wrote no position. They would not react to torchrun's SIGTERM."""
        for rank in set(range(len(self.peers))) - self._heard().keys():
            host, pid = self.peers[rank]
            if host == socket.gethostname() and not _ended(pid):
                os.kill(pid, signal.SIGKILL)


def ranks_of(run_dir: Path) -> list[tuple[str, int]]:
    """Return (host, process ID) of each rank of the last run that started in this directory."""
    path = run_dir / RANKS
    return [(host, pid) for host, pid in json.loads(path.read_text())] if path.is_file() else []


def ended_ranks(ranks: list[tuple[str, int]]) -> str:
    """Return a phrase that names the ranks of this host whose process has ended, or an empty string."""
    gone = [
        f"rank {rank} (host {host}, process {pid})"
        for rank, (host, pid) in enumerate(ranks)
        if host == socket.gethostname() and _ended(pid)
    ]
    return f"{', '.join(gone)} died" if gone else ""


def _ended(pid: int) -> bool:
    """Return whether a process of this host has ended or is exiting. Always False outside Linux.

    A zombie counts as ended. An exiting process counts too, because its sockets close, and its peers notice,
    before the kernel reports the process as dead.
    """
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return state in "ZX" or bool(int(numbers[5]) & PF_EXITING)
    except FileNotFoundError:
        return Path("/proc/self").exists()
