"""How ranks meet: within a time limit, and never with ranks of an earlier attempt."""

import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import FAILED

TIMEOUT_KEY = "trainer.rendezvous_timeout"
ELASTIC_RANKS = "OLMOE_ELASTIC_RANKS"
"""Environment variable with the numbers of ranks that the launcher may start, as 8,16,24, if not one."""
POLL_S = 0.05
"""Seconds between two looks of rank 0 at who has come."""


@contextmanager
def time_limit(seconds: float, expired: Callable[[], None]) -> Iterator[None]:
    """End this process if the block takes longer than `seconds`.

    For calls that wait for other ranks and cannot be interrupted otherwise.

    Args:
        seconds: Maximum duration of the block.
        expired: Called before the process exits, in another thread. It reports the reason.
    """

    def leave() -> None:
        expired()
        sys.stderr.flush()
        os._exit(FAILED)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def place_of(rank: int) -> str:
    """Name this process in a message. rank: its rank."""
    return f"rank {rank} (host {socket.gethostname()}, process {os.getpid()})"


def join(backend: str, limit: timedelta, collective_timeout: timedelta) -> None:
    """Create the process group of the ranks in the environment variables of torchrun.

    Args:
        backend: As of `torch.distributed.init_process_group`.
        limit: Maximum time until all ranks have met. After it, the process prints who is missing and exits.
        collective_timeout: Time that a collective of the group waits for the slowest rank.

    Raises:
        UserError: The address of rank 0 cannot be used.
        ConnectionError: The connection to rank 0 was refused or lost.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment has WORLD_SIZE, but not {', '.join(missing)}: start several ranks with "
            "torchrun, or unset WORLD_SIZE"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    waiting_for = [f"the store of rank 0 at MASTER_ADDR={host}, MASTER_PORT={port}"]

    def expired() -> None:
        text = (
            f"error: {place_of(rank)} waited {TIMEOUT_KEY}={limit.total_seconds():g} s for {waiting_for[0]}"
        )
        print(text + _advice(), file=sys.stderr)

    try:
        with time_limit(limit.total_seconds(), expired):
            # As env:// does it, but rank 0 goes on at once, so that it can tell which ranks are missing. The
            # timeouts are twice the limit, so that the limit ends the wait, with its message.
            is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
            tcp = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=is_host, timeout=2 * limit, wait_for_workers=False, multi_tenant=True
            )
            prefix = common_prefix(tcp, rank, world_size, 2 * limit, waiting_for)
            waiting_for[0] = "the connections between all ranks"
            tcp.set_timeout(collective_timeout)
            store = dist.PrefixStore(prefix, tcp)  # type: ignore[attr-defined]
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=collective_timeout
            )
    except dist.DistNetworkError as error:
        raise UserError(
            f"the ranks cannot meet at MASTER_ADDR={host}, MASTER_PORT={port}: "
            f"{str(error).splitlines()[0]}\n  "
            "Choose a port that is not in use (torchrun --standalone takes a free one), or end what uses it."
        ) from None
    except dist.DistError as error:
        raise ConnectionError(f"lost {waiting_for[0]}: {str(error).splitlines()[0]}{_advice()}") from None


def leave_distributed(timeout_s: float) -> None:
    """Destroy the process group, if there is one. After `timeout_s` seconds the process exits with 1."""

    def expired() -> None:
        text = f"waited {TIMEOUT_KEY}={timeout_s:g} s for the other ranks, to leave the process group"
        print(
            f"error: rank {os.environ.get('RANK', '0')} (host {socket.gethostname()}) {text}", file=sys.stderr
        )

    if dist.is_initialized():
        with time_limit(timeout_s, expired):
            dist.destroy_process_group()


def common_prefix(
    store: Store, rank: int, world_size: int, timeout: timedelta, waiting_for: list[str]
) -> str:
    """Agree with all ranks on a prefix that no earlier attempt has used; collective.

    Workers that torchrun restarts can receive the store of the previous workers (torch 2.13). Under the same
    prefix they would find the previous workers' addresses. Each torchrun counts its own restarts
    (TORCHELASTIC_RESTART_COUNT), so the counts of two nodes can differ. Instead rank 0 chooses the prefix. It
    answers to a number that each rank draws, so an answer to a previous worker is never taken for a new one.

    Args:
        store: The store of all ranks.
        rank: This rank.
        world_size: Number of ranks.
        timeout: Maximum time that a rank other than 0 waits for rank 0.
        waiting_for: The item 0 is kept up to date: the ranks that this rank waits for, as a phrase.

    Returns:
        The same prefix on all ranks.
    """
    if rank != 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        waiting_for[0] = "rank 0"
        store.wait([f"answer/{question}"], timeout)
        prefix = store.get(f"answer/{question}").decode()
        store.set(f"{prefix}/joined/{rank}", "")
        return prefix
    prefix = uuid.uuid4().hex
    missing = list(range(1, world_size))
    while missing:
        waiting_for[0] = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        for other in missing:
            if store.check([f"question/{other}"]):
                question = store.get(f"question/{other}").decode()
                store.set(f"answer/{question}", prefix)
        missing = [other for other in missing if not store.check([f"{prefix}/joined/{other}"])]
        time.sleep(POLL_S if missing else 0)
    return prefix


def launcher_warnings() -> list[str]:
    """A warning if torchrun keeps one store over restarts on several nodes."""
    advice = _advice()
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return (
        [f"a torchrun that is started again cannot rejoin the others.{advice}"] if advice and restarts else []
    )


def _advice() -> str:
    """What to do about torchrun's store, or an empty string.

    On several nodes, a torchrun that is started again waits 60 s for the address of that store, and fails:
    the others do not publish the address again (torch 2.13). If it is the torchrun of the first node, the
    others keep its old address.
    """
    several_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if not several_nodes or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return ""
    return (
        "\n  Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node. "
        "`python -m olmoe_train.cli.torchrun`, which takes the arguments of torchrun, sets it."
    )
