"""The learning rate as a function of the step: warm-up, then cosine, linear or constant."""

import math
from dataclasses import dataclass

from olmoe_train.config.choices import Schedule as Shape
from olmoe_train.config.train import SchedulerConfig


@dataclass(frozen=True)
class Schedule:
    """Factor by which every peak learning rate is multiplied in a step.

    Linear from warmup_start_factor at step 0 to 1 at `warmup_end`, then cosine, linear or constant, reaching
    final_factor at `decay_end` and staying there. The released run: from 10% of the peak to the peak in
    10,485,760,000 tokens, cosine to 10% at 5e12 tokens (arXiv 2409.02060, appendix B; OLMo's
    cosine_with_warmup).
    """

    cfg: SchedulerConfig
    warmup_end: float
    """Step at which the warm-up ends; fractional where it is given in tokens."""
    decay_end: float
    """Step at which the decay ends; fractional where it is given in tokens."""

    def multiplier(self, step: int) -> float:
        """The factor of optimizer step `step`, counted from 1, so that the decay's last step gets the final
        value."""
        cfg, warmup_end, decay_end = self.cfg, self.warmup_end, self.decay_end
        if step < warmup_end:
            return cfg.warmup_start_factor + (1 - cfg.warmup_start_factor) * step / warmup_end
        if cfg.kind is Shape.constant:
            return 1.0
        progress = 1.0
        if decay_end > warmup_end:
            progress = min(1.0, (step - warmup_end) / (decay_end - warmup_end))
        shape = (1 + math.cos(math.pi * progress)) / 2 if cfg.kind is Shape.cosine else 1 - progress
        return cfg.final_factor + (1 - cfg.final_factor) * shape
