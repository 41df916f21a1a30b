"""The learning rate as a function of the step: warm-up, then constant or stable, then a decay."""

import math
from dataclasses import dataclass

from olmoe_train.config.choices import DecayShape
from olmoe_train.config.choices import Schedule as Kind
from olmoe_train.config.train import SchedulerConfig
from olmoe_train.data.batch_sizes import BatchSizes


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
    sizes: BatchSizes | None = None
    """Sequences of every step. A phase whose length is given in tokens proceeds with the tokens, and one in
    steps with the steps. None: every step has the same, so that there is no difference."""

    def multiplier(self, step: int) -> float:
        """The factor of optimizer step `step`, counted from 1, so that the decay's last step gets the final
        value."""
        cfg, warmup_end = self.cfg, self.warmup_end
        if step < warmup_end:
            passed = self._passed(step, 0.0, warmup_end, cfg.warmup_tokens is not None)
            return cfg.warmup_start_factor + (1 - cfg.warmup_start_factor) * passed
        if cfg.kind is Kind.constant or step < self.decay_start:
            return 1.0
        progress = 1.0
        if self.decay_end > self.decay_start:
            by_tokens = cfg.decay_tokens is not None or cfg.decay_length_tokens is not None
            progress = min(1.0, self._passed(step, self.decay_start, self.decay_end, by_tokens))
        return cfg.final_factor + (1 - cfg.final_factor) * _remaining(self.shape, progress)

    def _passed(self, step: int, start: float, end: float, by_tokens: bool) -> float:
        """The part of a phase from step `start` to step `end` that has passed after step `step`."""
        if by_tokens and self.sizes is not None and self.sizes.warmup:
            begin, now, until = (self.sizes.tokens_after(one) for one in (start, step, end))
            return (now - begin) / (until - begin)
        return (step - start) / (end - start)

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
