"""The length of a run in optimizer steps: its end, and the ends of warm-up and decay."""

import math

from olmoe_train.config.choices import Schedule
from olmoe_train.config.train import SchedulerConfig, TrainerConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.utils.errors import UserError

DECAY_LENGTHS = ("decay_length_steps", "decay_length_tokens", "decay_fraction")
"""The keys of `scheduler` that give the length of the decay of kind=wsd."""


def total_steps(trainer: TrainerConfig, sequence_length: int, samples_per_epoch: int | None = None) -> int:
    """Optimizer steps of the whole run: trainer.max_steps, max_tokens or max_epochs, whichever ends it first.

    Tokens and epochs are rounded up to whole steps.

    Args:
        trainer: the run's limits.
        sequence_length: tokens per sequence.
        samples_per_epoch: sequences of one epoch of the training data; needed with trainer.max_epochs only.
    """
    sizes = BatchSizes.of(trainer, sequence_length)
    limits = [trainer.max_steps] if trainer.max_steps is not None else []
    if trainer.max_tokens is not None:
        limits.append(sizes.steps_for(math.ceil(trainer.max_tokens / sequence_length)))
    if trainer.max_epochs is not None:
        assert samples_per_epoch is not None, "epochs of data that was not opened"
        limits.append(sizes.steps_for(round(trainer.max_epochs * samples_per_epoch)))
    return min(limits)


def warmup_and_decay_steps(
    scheduler: SchedulerConfig, sizes: BatchSizes, last_step: int
) -> tuple[float, float, float]:
    """(end of warm-up, start of decay, end of decay) in optimizer steps; fractional if given in tokens.

    sizes: Of every step of the run, with the sequence length.

    Raises:
        UserError: The decay of kind=wsd would begin before the warm-up ends.
    """
    decay_end = float(last_step)
    if scheduler.decay_steps is not None:
        decay_end = float(scheduler.decay_steps)
    elif scheduler.decay_tokens is not None:
        decay_end = sizes.step_of_tokens(scheduler.decay_tokens)
    warmup_end = (scheduler.warmup_fraction or 0.0) * decay_end
    if scheduler.warmup_steps is not None:
        warmup_end = float(scheduler.warmup_steps)
    elif scheduler.warmup_tokens is not None:
        warmup_end = sizes.step_of_tokens(scheduler.warmup_tokens)
    if scheduler.kind is not Schedule.wsd:
        return warmup_end, warmup_end, decay_end
    length = _decay_length(scheduler, sizes, decay_end)
    if length > decay_end - warmup_end:
        key = next(name for name in DECAY_LENGTHS if getattr(scheduler, name) is not None)
        raise UserError(
            f"scheduler.{key}={getattr(scheduler, key)}: a decay of {length:,.10g} step{'s' * (length != 1)} "
            f"does not fit in between the end of the warm-up at step {warmup_end:,.10g} and the end of the "
            f"decay at step {decay_end:,.10g}; make the decay or the warm-up shorter, or the run longer"
        )
    return warmup_end, decay_end - length, decay_end


def _decay_length(scheduler: SchedulerConfig, sizes: BatchSizes, decay_end: float) -> float:
    """Length of the decay of kind=wsd in optimizer steps."""
    if scheduler.decay_length_steps is not None:
        return float(scheduler.decay_length_steps)
    if scheduler.decay_length_tokens is not None:
        length = scheduler.decay_length_tokens / (sizes.last * sizes.sequence_length)
        if decay_end - length >= sizes.warmup_steps:
            return length
        start = sizes.tokens_after(decay_end) - scheduler.decay_length_tokens
        return decay_end - sizes.step_of_tokens(start) if start >= 0 else length
    assert scheduler.decay_fraction is not None, "the preflight checks ask for a length"
    return scheduler.decay_fraction * decay_end


def schedule_in_words(scheduler: SchedulerConfig, sizes: BatchSizes, last_step: int) -> str:
    """The phases of the learning rate with the steps at which they end."""
    warmup_end, decay_start, decay_end = warmup_and_decay_steps(scheduler, sizes, last_step)
    phases = [f"warm-up to step {warmup_end:,.10g}"] if warmup_end else []
    if scheduler.kind is Schedule.constant:
        return ", ".join([*phases, "constant"])
    shape = scheduler.kind.value
    if scheduler.kind is Schedule.wsd:
        shape = scheduler.decay_shape.value
        phases.append(f"stable to step {decay_start:,.10g}")
    final = f"{100 * scheduler.final_factor:.4g}%"
    decay = f"{shape} decay to {final} of the peak at step {decay_end:,.10g}"
    return ", ".join([*phases, decay])
