"""Optimizer steps that are skipped: their loss or gradients are not finite, or spike.

The gradient norm and the loss are sums over all ranks, so every rank decides alike without communication
beyond the loss's own sum, and the decision stays on the device. The host reads it where it logs and before it
saves.
"""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.train import TrainerConfig

log = logging.getLogger(__name__)
WINDOW = 128
"""Steps that a spike is compared with, and that trainer.max_skipped_steps counts over."""
ENOUGH = 32
"""Fewest steps whose mean and standard deviation define a spike."""
UNSEEN, USED, NOT_FINITE, SPIKE = -1, 0, 1, 2
REASONS = {NOT_FINITE: "gradient or loss is not finite", SPIKE: "loss or gradient norm is a spike"}


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Take the optimizer's step, unless `skip` (bool scalar on the device) is true.

    Fused torch optimizers read the decision on the device (`found_inf`) and then leave parameters, moments
    and their step count as they are; the host does not wait. For any other optimizer the host reads the
    decision, which waits for the device once per step.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(skip):
        optimizer.step()


def store_unless(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Set `target` to `value` in its dtype, unless `skip` (bool scalar on the device) is true."""
    target.copy_(value if skip is None else torch.where(skip, target, value))


@dataclass(frozen=True)
class GuardState:
    """What resuming needs, as JSON; one entry per step of the window, at index step % WINDOW."""

    outcomes: list[int]
    losses: list[float | None]
    grad_norms: list[float | None]
    skipped: int
    """Skipped steps of the whole run."""


class SkipGuard:
    """Judges each step by the last WINDOW steps, on the device. Only `check` and `state` wait for it."""

    def __init__(self, cfg: TrainerConfig, saved: dict[str, Any] | None, device: torch.device) -> None:
        """saved: `state()` of an earlier process; None for a new run."""
        self.budget, self.sigmas = cfg.max_skipped_steps, cfg.spike_sigmas
        nothing: list[float | None] = [None] * WINDOW
        state = GuardState(**saved) if saved else GuardState([UNSEEN] * WINDOW, nothing, nothing, 0)
        self.outcomes = torch.tensor(state.outcomes, device=device)
        history = [[math.nan if v is None else v for v in row] for row in (state.losses, state.grad_norms)]
        # [loss and gradient norm, WINDOW]; NaN where there was no step yet, or nothing finite.
        self.history = torch.tensor(history, device=device)
        self.skipped = torch.tensor(state.skipped, device=device)
        self.reported = state.skipped

    @torch.no_grad()
    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the update of `step` must be skipped: bool scalar on the device, equal on every rank.

        Args:
            step: counted from 1.
            loss: this rank's share of the step's loss, fp32 scalar.
            grad_norm: over all ranks, fp32 scalar.
        """
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        values = torch.stack([loss, grad_norm])
        finite = values.isfinite().all()
        limits = self._limits()
        spike = finite & (values > limits).any()
        outcome = torch.where(finite, spike.long() * SPIKE, NOT_FINITE)
        at = step % WINDOW
        self.outcomes[at] = outcome
        # A spike enters as its limit: it neither hides the next one, nor is a new level skipped for ever.
        self.history[:, at] = torch.where(finite, values.minimum(limits), math.nan)
        skip = outcome != USED
        self.skipped += skip
        return skip

    def _limits(self) -> Tensor:
        """[loss, gradient norm] above which a step is a spike."""
        if self.sigmas is None:
            return torch.full((2,), math.inf, device=self.history.device)
        seen = self.history.isfinite()
        count = seen.sum(1)
        values = self.history.nan_to_num()
        mean = values.sum(1) / count
        deviation = (((values - mean[:, None]) * seen).square().sum(1) / count).sqrt()
        return torch.where(count >= ENOUGH, mean + self.sigmas * deviation, math.inf)

    def check(self, step: int) -> int:
        """Skipped steps of the run up to `step`; warns of those not yet reported.

        Raises:
            FloatingPointError: more than trainer.max_skipped_steps of the last WINDOW steps were skipped.
        """
        skipped, outcomes = int(self.skipped), self.outcomes.tolist()
        recent = [s for s in range(max(1, step - WINDOW + 1), step + 1) if outcomes[s % WINDOW] in REASONS]
        if skipped > self.reported:
            why = " and ".join(text for kind, text in REASONS.items() if kind in outcomes)
            steps = ", ".join(map(str, recent[-5:]))
            log.warning("WARNING: %d updates skipped, lately at %s: %s", skipped - self.reported, steps, why)
            self.reported = skipped
        if len(recent) > self.budget:
            raise FloatingPointError(
                f"{len(recent)} of the last {min(step, WINDOW)} updates were skipped, more than "
                f"trainer.max_skipped_steps={self.budget}: stopped without saving. Lower optimizer.lr or "
                "lengthen the warm-up, and continue from the last checkpoint"
            )
        return skipped

    def state(self) -> dict[str, Any]:
        """JSON values for the checkpoint."""
        losses, norms = (
            [value if math.isfinite(value) else None for value in row] for row in self.history.tolist()
        )
        return asdict(GuardState(self.outcomes.tolist(), losses, norms, int(self.skipped)))
