"""What hosts have in common: the prepared data, clocks, and the file system of run_dir. All is collective."""

import errno
import fcntl
import secrets
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from hashlib import blake2b
from pathlib import Path

import torch
import torch.distributed as dist

from olmoe_train.data.manifest import MANIFEST
from olmoe_train.data.mixture import mixture_components
from olmoe_train.distributed.collectives import gather_from_all, on_rank_0
from olmoe_train.training.preflight.machine.result import Result, Site, State

CLOCK_ROUNDS = 7
CLOCK_WARNING_S, CLOCK_FAILURE_S = 1.0, 60.0
"""Beyond the first, logs of hosts cannot be put in order. Beyond the second, launch/slurm.sbatch may take the
status.json of an earlier job for that of its own, and servers may refuse requests."""
SEEN_S = 10.0
"""Longest time until a file of one host is seen on another. No name is looked up before its file exists,
so an NFS client has not cached that there is none, which it would believe for 30 s (nfs(5), acdirmin)."""


def data(site: Site) -> list[Result]:
    """The prepared data is here, and is that of rank 0. Collective."""
    if site.cfg.data.dir == "none":
        return [Result("data", State.skipped, "no data.dir is given")]
    found = gather_from_all(lambda: _manifests(site))
    (digest, problem), (first, _) = found[site.rank], found[0]
    where = f"data.dir={site.cfg.data.dir}"
    fix = "set data.dir to a directory that all hosts have, with the same content"
    if problem:
        return [Result("data", State.failed, f"{where}: {problem}", fix)]
    if first and digest != first:
        return [Result("data", State.failed, f"{where}: its manifest is another one than on rank 0", fix)]
    return [Result("data", State.ok, "the data is there, the same as on rank 0")]


def _manifests(site: Site) -> tuple[str, str]:
    """A hash of the manifests of the data, or why they cannot be read."""
    digest = blake2b(digest_size=16)
    try:
        for source in mixture_components(site.cfg.data):
            digest.update((source.directory / MANIFEST).read_bytes())
    except OSError as error:
        return "", f"{error.filename} cannot be read: {error.strerror}"
    return digest.hexdigest(), ""


def clocks(site: Site) -> list[Result]:
    """The clock of this host agrees with that of rank 0. Collective.

    All ranks look at their clocks as they leave the same barrier, several times; the median counts. The error
    is about that of the barrier, milliseconds.
    """
    if site.world_size == 1:
        return [Result("clocks", State.skipped, "one rank")]
    offsets = []
    for _ in range(CLOCK_ROUNDS):
        dist.all_reduce(torch.zeros(1))
        times = gather_from_all(time.time)
        offsets.append(times[site.rank] - times[0])
    return [clock_result(statistics.median(offsets))]


def clock_result(offset_s: float) -> Result:
    """offset_s: clock of this host less that of rank 0, in seconds."""
    size, values = abs(offset_s), {"offset_seconds": offset_s}
    if size <= CLOCK_WARNING_S:
        return Result("clocks", State.ok, "agrees with rank 0 to within 1 s", values=values)
    what = (
        f"the clock of this host is {size:,.1f} s {'ahead of' if offset_s > 0 else 'behind'} that of rank 0"
    )
    fix = "run an NTP client on every host (`chronyc tracking`, `timedatectl`)"
    state = State.failed if size > CLOCK_FAILURE_S else State.warning
    return Result("clocks", state, what, fix, values)


def shared_files(site: Site) -> list[Result]:
    """run_dir is one directory for all ranks: files, renames and locks of rank 0 are seen. Collective.

    Rank 0 makes a directory in run_dir, and removes it at the end, with run_dir if that was not there.
    """
    if site.world_size == 1:
        return [Result("shared_files", State.skipped, "one rank")]
    run_dir = Path(site.cfg.run_dir).expanduser()
    was_there = gather_from_all(run_dir.is_dir)[0]
    token = gather_from_all(lambda: secrets.token_hex(4))[0]
    first, renamed = run_dir / f".doctor-{token}", run_dir / f".doctor-{token}-renamed"

    def make() -> None:
        first.mkdir(parents=True)
        (first / "from-0").write_text("0")

    made = gather_from_all(lambda: "" if site.rank else _error_of(make))[0]
    if made:
        return [Result("shared_files", State.skipped, f"rank 0 cannot write: {made}")]
    try:
        started = time.monotonic()
        problem = _seen_problem(site, first, renamed)
        seconds = time.monotonic() - started
        unlocked = _lock_problem(site, renamed / "lock")
    finally:
        on_rank_0(lambda: _remove(run_dir, first, renamed, was_there))
    if problem:
        fix = "set run_dir to a directory on a file system that all hosts mount"
        return [Result("shared_files", State.failed, f"run_dir={run_dir}: {problem}", fix)]
    if unlocked:
        fix = "mount it with locks (NFS: without nolock; Lustre: with flock), or start no second run in it"
        return [Result("shared_files", State.warning, f"run_dir={run_dir}: {unlocked}", fix)]
    what = "run_dir is that of rank 0: files, renames and locks are seen"
    return [Result("shared_files", State.ok, what, values={"seconds": seconds})]


def _seen_problem(site: Site, first: Path, renamed: Path) -> str:
    """What this rank does not see of others; empty: it sees all. Every rank goes through every step."""
    problem = ""
    if not _within(SEEN_S, lambda: (first / "from-0").read_text() == "0"):
        problem = "here it is another directory than on rank 0, whose files are not seen"
    elif site.rank and (reason := _error_of(lambda: _touch(first / f"from-{site.rank}"))):
        problem = f"no file can be written into a directory of rank 0: {reason}"
    wrote = [rank for rank, has in enumerate(gather_from_all(lambda: not problem)) if has]
    if site.rank == 0:
        unseen = [rank for rank in wrote if not _within(SEEN_S, (first / f"from-{rank}").exists)]
        if unseen:
            problem = f"rank 0 does not see the files of ranks {', '.join(map(str, unseen))}"
    on_rank_0(lambda: first.rename(renamed))
    if not problem and not _within(SEEN_S, (renamed / "from-0").exists):
        problem = "a directory that rank 0 has renamed is not seen under its new name"
    return problem


def _lock_problem(site: Site, file: Path) -> str:
    """Why a lock of rank 0, of the kind that keeps a second run out of run_dir, is not seen on this rank."""
    with ExitStack() as held:

        def lock() -> None:
            fcntl.lockf(held.enter_context(file.open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)

        problem = gather_from_all(lambda: "" if site.rank else _error_of(lock))[0]
        if not problem and site.rank:
            try:
                with file.open("r+") as same:
                    fcntl.lockf(same, fcntl.LOCK_EX | fcntl.LOCK_NB)
                problem = "a lock of rank 0 is not seen here, so nothing keeps out a second run on this host"
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
                    problem = f"locks fail: {error.strerror}"
        dist.all_reduce(torch.zeros(1))  # rank 0 keeps the lock until all have tried
    return problem


def _within(seconds: float, seen: Callable[[], bool]) -> bool:
    """Whether `seen` becomes true in time."""
    until = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if seen():
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def _error_of(work: Callable[[], object]) -> str:
    """Why work on files fails; empty: it does not."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _touch(file: Path) -> None:
    file.write_text("")


def _remove(run_dir: Path, first: Path, renamed: Path, was_there: bool) -> None:
    for directory in (first, renamed):
        shutil.rmtree(directory, ignore_errors=True)
    if not was_there:
        with suppress(OSError):
            run_dir.rmdir()
