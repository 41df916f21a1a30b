"""How long a run is, in optimizer steps: its end, and the ends of warm-up and decay."""

import math

from olmoe_train.config.train import TrainConfig
from olmoe_train.data.loader import TrainSamples


def tokens_per_step(cfg: TrainConfig) -> int:
    return cfg.trainer.global_batch_size * cfg.data.sequence_length


def total_steps(cfg: TrainConfig) -> int:
    """Optimizer steps of the whole run: trainer.max_steps, max_tokens or max_epochs, whichever ends it first.

    Tokens and epochs are rounded up to whole steps. Only max_epochs looks at the data.
    """
    limits = [cfg.trainer.max_steps] if cfg.trainer.max_steps is not None else []
    if cfg.trainer.max_tokens is not None:
        limits.append(math.ceil(cfg.trainer.max_tokens / tokens_per_step(cfg)))
    if cfg.trainer.max_epochs is not None:
        samples = round(cfg.trainer.max_epochs * TrainSamples(cfg.data, cfg.seed).epoch)
        limits.append(math.ceil(samples / cfg.trainer.global_batch_size))
    return min(limits)


def warmup_and_decay_steps(cfg: TrainConfig) -> tuple[float, float]:
    """(end of warm-up, end of decay) in optimizer steps; fractional where they are given in tokens."""
    scheduler, a_step = cfg.scheduler, tokens_per_step(cfg)
    decay = float(total_steps(cfg))
    if scheduler.decay_steps is not None:
        decay = float(scheduler.decay_steps)
    elif scheduler.decay_tokens is not None:
        decay = scheduler.decay_tokens / a_step
    if scheduler.warmup_steps is not None:
        return float(scheduler.warmup_steps), decay
    if scheduler.warmup_tokens is not None:
        return scheduler.warmup_tokens / a_step, decay
    return (scheduler.warmup_fraction or 0.0) * decay, decay
