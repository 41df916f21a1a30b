"""The length of a run in optimizer steps: its end, and the ends of warm-up and decay."""

import math

from olmoe_train.config.train import TrainConfig
from olmoe_train.data.loader import TrainSamples


def tokens_per_step(cfg: TrainConfig) -> int:
    """Tokens of one optimizer step over all ranks, padding included."""
    return cfg.trainer.global_batch_size * cfg.data.sequence_length


def total_steps(cfg: TrainConfig) -> int:
    """Optimizer steps of the whole run.

    The run ends with the first of trainer.max_steps, max_tokens and max_epochs. Tokens and epochs are rounded
    up to whole steps. The prepared data is read only for max_epochs.
    """
    limits = [cfg.trainer.max_steps] if cfg.trainer.max_steps is not None else []
    if cfg.trainer.max_tokens is not None:
        limits.append(math.ceil(cfg.trainer.max_tokens / tokens_per_step(cfg)))
    if cfg.trainer.max_epochs is not None:
        samples = round(cfg.trainer.max_epochs * TrainSamples(cfg.data, cfg.seed).epoch)
        limits.append(math.ceil(samples / cfg.trainer.global_batch_size))
    return min(limits)


def warmup_and_decay_steps(cfg: TrainConfig) -> tuple[float, float]:
    """Optimizer steps at which warm-up and decay end; fractional if they are configured in tokens."""
    scheduler, step_tokens = cfg.scheduler, tokens_per_step(cfg)
    decay = float(total_steps(cfg))
    if scheduler.decay_steps is not None:
        decay = float(scheduler.decay_steps)
    elif scheduler.decay_tokens is not None:
        decay = scheduler.decay_tokens / step_tokens
    if scheduler.warmup_steps is not None:
        return float(scheduler.warmup_steps), decay
    if scheduler.warmup_tokens is not None:
        return scheduler.warmup_tokens / step_tokens, decay
    return (scheduler.warmup_fraction or 0.0) * decay, decay
