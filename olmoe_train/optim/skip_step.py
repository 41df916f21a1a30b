"""Steps whose gradients are not used: not finite, or a spike. Decided on the device, by all ranks alike.

The gradient norm and the loss are sums over all ranks, so every rank decides alike without a word, and the
host does not wait: fused AdamW reads `found_inf` on the device and leaves parameters, moments and its step
count as they are. The host looks at what was skipped when it logs and before it saves.
"""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.train import TrainerConfig

log = logging.getLogger("olmoe")
WINDOW = 128  # steps that a spike is compared to, and that trainer.max_skipped_steps counts over
# A mean and a deviation of fewer steps say little.
ENOUGH = 32
UNSEEN, USED, NOT_FINITE, SPIKE = -1, 0, 1, 2
REASONS = {NOT_FINITE: "gradient or loss is not finite", SPIKE: "loss or gradient norm is a spike"}


@dataclass(frozen=True)
class GuardState:
    """What resuming needs, as JSON; one entry a step of the window, at index step % WINDOW."""

    outcomes: list[int]
    losses: list[float | None]
    grad_norms: list[float | None]
    skipped: int
    """Skipped steps of the whole run."""


class StepGuard:
    """Remembers the last WINDOW steps on the device; `check` is the only place that waits for it."""

    def __init__(self, cfg: TrainerConfig, saved: dict[str, Any] | None, device: torch.device) -> None:
        self.budget, self.sigmas = cfg.max_skipped_steps, cfg.spike_sigmas
        nothing: list[float | None] = [None] * WINDOW
        state = GuardState(**saved) if saved else GuardState([UNSEEN] * WINDOW, nothing, nothing, 0)
        self.outcomes = torch.tensor(state.outcomes, device=device)
        history = [[math.nan if v is None else v for v in row] for row in (state.losses, state.grad_norms)]
        # [loss and gradient norm, WINDOW]; NaN where there was no step yet, or nothing finite.
        self.history = torch.tensor(history, device=device)
        self.skipped = torch.tensor(state.skipped, device=device)
        self.told = state.skipped

    @torch.no_grad()
    def decide(self, optimizer: torch.optim.Optimizer, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Make the optimizer's next step do nothing if this one's gradients cannot be used.

        loss: this rank's share of the step's, a scalar as grad_norm is; collective.
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
        self.skipped += outcome != USED
        optimizer.found_inf = (outcome != USED).float()  # type: ignore[attr-defined]

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
        """How many steps of the run were skipped, up to `step`; tells of new ones.

        FloatingPointError where more than trainer.max_skipped_steps of the last WINDOW steps were.
        """
        skipped, outcomes = int(self.skipped), self.outcomes.tolist()
        recent = [s for s in range(max(1, step - WINDOW + 1), step + 1) if outcomes[s % WINDOW] in REASONS]
        if skipped > self.told:
            why = " and ".join(text for kind, text in REASONS.items() if kind in outcomes)
            steps = ", ".join(map(str, recent[-5:]))
            log.warning("WARNING: %d updates skipped, lately at %s: %s", skipped - self.told, steps, why)
            self.told = skipped
        if len(recent) > self.budget:
            raise FloatingPointError(
                f"{len(recent)} of the last {min(step, WINDOW)} updates were skipped, more than "
                f"trainer.max_skipped_steps={self.budget}: stopped without saving. Lower optimizer.lr or "
                "lengthen the warm-up, and continue from the last checkpoint"
            )
        return skipped

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        losses, norms = (
            [value if math.isfinite(value) else None for value in row] for row in self.history.tolist()
        )
        return asdict(GuardState(self.outcomes.tolist(), losses, norms, int(self.skipped)))
