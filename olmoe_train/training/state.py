"""Where a run stands: everything that a checkpoint holds besides tensors."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Progress:
    """What a run has done; everything that resuming needs besides the tensors."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens trained on, padding not counted."""
    samples: int = 0
    """Sequences drawn from the data order: the loader's whole state."""
    expert_last_used: list[list[int]] | None = None
    """The last step at which each layer sent a token to each expert [L][E]; None: no step yet."""
    guard: dict[str, Any] | None = None
    """Losses, gradient norms and skipped steps of late (guard.GuardState); None: no step yet."""

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "Progress":
        known: dict[str, Any] = {item.name: state[item.name] for item in fields(cls)}
        return cls(**known)


def seed_dropout(seed: int, step: int) -> None:
    """Dropout is a function of (seed, step, rank): the same in count_experts and after it, and after a
    resume."""
    number = seed + step * 1_000_003 + dist.get_rank()
    # Not torch.manual_seed: without CUDA it formats a stack trace for later, 0.8 ms a call (torch 2.13).
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
