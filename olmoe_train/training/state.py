"""Where a run stands: what the loop advances, and what a checkpoint holds of it besides tensors."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

SAVED_FIELDS = ("step", "tokens", "samples")


@dataclass(frozen=True)
class TrainState:
    """The position of a run. The loop makes a new one after every optimizer step."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens trained on; padding is not counted."""
    samples: int = 0
    """Sequences drawn from the data order: the loader's whole state."""
    last_step: int = 0
    """Optimizer steps of the whole run."""
    stopped_by_signal: bool = False
    """Whether a signal ended the run before its last step. Running the same command again continues it."""

    @classmethod
    def from_saved(cls, saved: dict[str, Any] | None, last_step: int) -> "TrainState":
        """The position that a checkpoint holds; that of a new run where `saved` is None."""
        position = {name: saved[name] for name in SAVED_FIELDS} if saved is not None else {}
        return cls(**position, last_step=last_step)

    def advance(self, tokens: int, samples: int) -> "TrainState":
        """The position after one more optimizer step with these tokens and sequences (global batch)."""
        return replace(self, step=self.step + 1, tokens=self.tokens + tokens, samples=self.samples + samples)

    def ended(self, by_signal: bool) -> "TrainState":
        """The final position of this process; by_signal: it stopped before the run's last step was saved."""
        return replace(self, stopped_by_signal=by_signal)

    def saved(self) -> dict[str, Any]:
        """The JSON values that a checkpoint holds of the position."""
        return {name: getattr(self, name) for name in SAVED_FIELDS}


def seed_dropout(seed: int, step: int) -> None:
    """Seed the generators so that dropout is a function of (seed, step, rank).

    The extra forward pass of Objective.begin_step then drops what the training pass drops, and a resumed run
    draws what an uninterrupted run draws, although checkpoints hold no generator's state.
    """
    number = seed + step * 1_000_003 + dist.get_rank()
    # Not torch.manual_seed: without CUDA it formats a stack trace for later, 0.8 ms per call (torch 2.13).
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
