"""Run a function on several gloo ranks, one process per rank. All distributed tests use this harness."""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.fork_server import ENVIRONMENT, IMPORTS

# Seconds to wait, after the first failure, for the failures of the other ranks. A killed rank reports
# nothing, and the first report may come from a rank that lost its connection to the killed rank.
GRACE = 1.0


# tests/conftest.py sets this before each test: only tests with the marker `ranks` may start ranks.
allowed = True


class RankError(AssertionError):
    """A rank raised, died or hung. The message contains the report of every rank."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call fn(*args) on `world_size` ranks that share a gloo process group.

    `fn`, its arguments and its result are pickled, so `fn` must be defined at the top level of a module. When
    one rank fails, the others are killed. After `timeout` seconds every rank dumps its stack and exits.

    Returns:
        The results in rank order.

    Raises:
        RankError: A rank raised, died or hung.
    """
    assert allowed, "a test that starts ranks needs @pytest.mark.ranks"
    context = multiprocessing.get_context("forkserver")
    # Once for all ranks of all tests. With "spawn" every rank would spend five seconds on importing torch.
    context.set_forkserver_preload(IMPORTS)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENVIRONMENT.items():
            environment.setenv(name, value)
        forkserver.ensure_running()
    ranks, readers = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            args_of_rank = (rank, world_size, Path(scratch), timeout, writer, fn, args)
            process = context.Process(target=_rank_main, args=args_of_rank, daemon=True, name=f"rank {rank}")
            process.start()
            writer.close()
            ranks.append(process)
            readers.append(reader)
        try:
            return _collect(ranks, readers, Path(scratch), time.monotonic() + timeout + GRACE)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _rank_main(
    rank: int,
    world_size: int,
    scratch: Path,
    timeout: float,
    writer: Connection,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(timeout, exit=True, file=(scratch / f"stack-{rank}").open("w"))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)  # ranks share the cores
    gc.freeze()  # a collection need not visit what was imported; each took 0.2 s, and DeepSpeed makes several
    try:
        files = dist.FileStore(str(scratch / "store"), world_size)  # type: ignore[attr-defined]
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=files, rank=rank, world_size=world_size, timeout=limit)
        result = fn(*args)
        dist.barrier()
        dist.destroy_process_group()
        # Pickle here: the pipe's own pickler puts tensors in shared memory, which dies with this process.
        message = pickle.dumps((True, result))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(message)


def _collect(
    ranks: list[ForkServerProcess], readers: list[Connection], scratch: Path, deadline: float
) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(results) + len(errors) < len(ranks):
        rank_of = {readers[r]: r for r in range(len(ranks)) if r not in results and r not in errors}
        ready = wait(list(rank_of), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            assert isinstance(reader, Connection)  # wait() also takes sockets
            rank = rank_of[reader]
            try:
                succeeded, value = pickle.loads(reader.recv_bytes())  # noqa: S301  sent by our own ranks
                (results if succeeded else errors)[rank] = value
            except EOFError:
                ranks[rank].join()
                file = scratch / f"stack-{rank}"  # not empty if the rank timed out
                stack = file.read_text() if file.exists() else ""
                errors[rank] = f"died without a word, exit code {ranks[rank].exitcode}\n{stack}"
        if errors:
            deadline = min(deadline, time.monotonic() + GRACE)
    silent = [r for r in range(len(ranks)) if r not in results and r not in errors]
    if errors or silent:
        said = "".join(f"rank {rank}: {text}" for rank, text in errors.items())
        raise RankError(said + (f"ranks still running: {silent}" if silent else ""))
    return [results[rank] for rank in range(len(ranks))]
