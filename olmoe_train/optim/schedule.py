"""The learning rate as a function of the step: warm-up, then constant or stable, then a decay."""

import math
from dataclasses import dataclass

from olmoe_train.config.choices import DecayShape
from olmoe_train.config.choices import Schedule as Kind
from olmoe_train.config.train import SchedulerConfig


@dataclass(frozen=True)
class Schedule:
    """Factor by which every peak learning rate is multiplied in a step.

    Linear from warmup_start_factor at step 0 to 1 at `warmup_end`, then 1 until `decay_start`, then a decay
    that reaches final_factor at `decay_end` and stays there. kind=constant never decays. With cosine and
    linear the decay begins where the warm-up ends. The released run: from 10% of the peak to the peak in
    10,485,760,000 tokens, cosine to 10% at 5e12 tokens (arXiv 2409.02060, appendix B; OLMo's
    cosine_with_warmup).
    """

    cfg: SchedulerConfig
    warmup_end: float
    """Step at which the warm-up ends; fractional where it is given in tokens."""
    decay_start: float
    """Step at which the decay begins, the last one at the peak; fractional where it is given in tokens."""
    decay_end: float
    """Step at which the decay ends; fractional where it is given in tokens."""

    def multiplier(self, step: int) -> float:
        """The factor of optimizer step `step`, counted from 1, so that the decay's last step gets the final
        value."""
        cfg, warmup_end = self.cfg, self.warmup_end
        if step < warmup_end:
            return cfg.warmup_start_factor + (1 - cfg.warmup_start_factor) * step / warmup_end
        if cfg.kind is Kind.constant or step < self.decay_start:
            return 1.0
        progress = 1.0
        if self.decay_end > self.decay_start:
            progress = min(1.0, (step - self.decay_start) / (self.decay_end - self.decay_start))
        return cfg.final_factor + (1 - cfg.final_factor) * _remaining(self.shape, progress)

    @property
    def shape(self) -> DecayShape:
        """The shape of the decay."""
        if self.cfg.kind is Kind.wsd:
            return self.cfg.decay_shape
        return DecayShape.cosine if self.cfg.kind is Kind.cosine else DecayShape.linear


def _remaining(shape: DecayShape, progress: float) -> float:
    """What remains of the decay, from 1 to 0, once the part `progress` of it has passed."""
    if shape is DecayShape.cosine:
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - (math.sqrt(progress) if shape is DecayShape.sqrt else progress)
