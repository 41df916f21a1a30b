"""The length of a run in optimizer steps: its end, and the ends of warm-up and decay."""

import math

from olmoe_train.config.train import SchedulerConfig, TrainerConfig


def tokens_per_step(trainer: TrainerConfig, sequence_length: int) -> int:
    """Tokens of one global batch, padding included."""
    return trainer.global_batch_size * sequence_length


def total_steps(trainer: TrainerConfig, sequence_length: int, samples_per_epoch: int | None = None) -> int:
    """Optimizer steps of the whole run: trainer.max_steps, max_tokens or max_epochs, whichever ends it first.

    Tokens and epochs are rounded up to whole steps.

    Args:
        trainer: the run's limits.
        sequence_length: tokens per sequence.
        samples_per_epoch: sequences of one epoch of the training data; needed with trainer.max_epochs only.
    """
    limits = [trainer.max_steps] if trainer.max_steps is not None else []
    if trainer.max_tokens is not None:
        limits.append(math.ceil(trainer.max_tokens / tokens_per_step(trainer, sequence_length)))
    if trainer.max_epochs is not None:
        assert samples_per_epoch is not None, "epochs of data that was not opened"
        limits.append(math.ceil(round(trainer.max_epochs * samples_per_epoch) / trainer.global_batch_size))
    return min(limits)


def warmup_and_decay_steps(
    scheduler: SchedulerConfig, tokens_per_step: int, last_step: int
) -> tuple[float, float]:
    """(end of warm-up, end of decay) in optimizer steps; fractional where they are given in tokens."""
    decay = float(last_step)
    if scheduler.decay_steps is not None:
        decay = float(scheduler.decay_steps)
    elif scheduler.decay_tokens is not None:
        decay = scheduler.decay_tokens / tokens_per_step
    if scheduler.warmup_steps is not None:
        return float(scheduler.warmup_steps), decay
    if scheduler.warmup_tokens is not None:
        return scheduler.warmup_tokens / tokens_per_step, decay
    return (scheduler.warmup_fraction or 0.0) * decay, decay
