"""Ranks in step: what fails on one of them fails on all, with the same words."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from olmoe_train.utils.errors import UserError

Result = TypeVar("Result")
Group = dist.ProcessGroup | None
"""Whose collectives to use; None: the default group's. Threads beside the training need their own."""


def everywhere(work: Callable[[], Result], group: Group = None) -> list[Result]:
    """Run on every rank and give every rank all results; where one fails, all raise what it raised.

    UserErrors as they are; anything else as a RuntimeError that names the rank.
    """
    outcome: Result | Exception
    try:
        outcome = work()
    except UserError as error:
        outcome = error
    except Exception as error:
        outcome = RuntimeError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group)
    for result in outcomes:
        if isinstance(result, Exception):
            raise result
    return outcomes


def on_rank_0(work: Callable[[], object], group: Group = None) -> None:
    """Run on rank 0 while the others wait for it."""
    everywhere(work if dist.get_rank() == 0 else lambda: None, group)


def on_any_rank(flag: bool) -> bool:
    """Whether it is set on any rank."""
    count = torch.tensor(int(flag))
    dist.all_reduce(count)
    return bool(count)
