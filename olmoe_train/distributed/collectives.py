"""Work that all ranks do together: if the work fails on one rank, every rank raises the same error."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from olmoe_train.distributed.rendezvous import place_of
from olmoe_train.utils.errors import UserError

Result = TypeVar("Result")
Group = dist.ProcessGroup | None
"""Process group of the collectives; None: the default group. A thread beside the training loop needs its
own group."""


def group_of_all_ranks() -> dist.ProcessGroup:
    """A new gloo group. Collective."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # torch 2.14: or a mark, on ranks outside the group
    return group


def gather_from_all(work: Callable[[], Result], group: Group = None) -> list[Result]:
    """Run `work` on every rank and gather the results on every rank.

    Args:
        work: Function without arguments; the result must be picklable.
        group: Process group that gathers the results.

    Returns:
        One result per rank, in rank order.

    Raises:
        UserError: `work` raised this UserError on a rank.
        RuntimeError: `work` raised another exception on a rank; the message names rank and host.
    """
    outcome: Result | Exception
    try:
        outcome = work()
    except UserError as error:
        outcome = error
    except Exception as error:
        outcome = RuntimeError(f"{place_of(dist.get_rank())}: {type(error).__name__}: {error}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group)
    for result in outcomes:
        if isinstance(result, Exception):
            raise result
    return outcomes


def on_rank_0(work: Callable[[], object], group: Group = None) -> None:
    """Run `work` on rank 0 while the other ranks wait.

    Args:
        work: Function without arguments; the result is discarded, but must be picklable.
        group: Process group of the ranks that wait.

    Raises:
        UserError: On every rank, if `work` raised this UserError.
        RuntimeError: On every rank, if `work` raised another exception.
    """
    gather_from_all(work if dist.get_rank() == 0 else lambda: None, group)


def on_any_rank(flag: bool) -> bool:
    """Return on every rank whether `flag` is true on at least one rank."""
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return bool(count)
