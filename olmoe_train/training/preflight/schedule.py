"""Checks of the learning rate's schedule."""

from dataclasses import replace

from olmoe_train.config.choices import Schedule
from olmoe_train.config.train import SchedulerConfig, TrainConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.planning.duration import (
    DECAY_LENGTHS,
    total_steps,
    warmup_and_decay_steps,
)
from olmoe_train.utils.errors import UserError

IN_DIFFERENT_UNITS = {
    "the length of the warm-up": ("warmup_steps", "warmup_tokens", "warmup_fraction"),
    "the end of the decay": ("decay_steps", "decay_tokens"),
    "the length of the decay": DECAY_LENGTHS,
}
"""What keys of `scheduler` give, each in a unit of its own."""
STOP = "trainer.stop_at_step"
OF_WSD = (*DECAY_LENGTHS, "decay_shape")
"""Keys of `scheduler` that only kind=wsd reads."""


def schedule_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with the schedule, one message per error."""
    scheduler, errors = cfg.scheduler, []
    for what, options in IN_DIFFERENT_UNITS.items():
        chosen = [
            f"scheduler.{name}={getattr(scheduler, name)}"
            for name in options
            if getattr(scheduler, name) is not None
        ]
        if len(chosen) > 1:
            errors.append(
                f"{' and '.join(chosen)}: set only one of them and the others to null; they are {what} in "
                "different units"
            )
        errors += [f"{text}: must not be negative" for text in chosen if "=-" in text]
    for name in ("warmup_fraction", "warmup_start_factor", "decay_fraction", "final_factor"):
        value = getattr(scheduler, name)
        if value is not None and not 0 <= value <= 1:
            errors.append(f"scheduler.{name}={value}: must be between 0 and 1")
    if scheduler.kind is Schedule.wsd and not errors:
        errors += _decay_errors(cfg)
    return errors


def _decay_errors(cfg: TrainConfig) -> list[str]:
    """Whether the decay of kind=wsd has a length, and fits into the run where its steps are known."""
    scheduler = cfg.scheduler
    lengths = {name: getattr(scheduler, name) for name in DECAY_LENGTHS}
    if all(value is None for value in lengths.values()):
        keys = ", ".join(f"scheduler.{name}" for name in DECAY_LENGTHS)
        return [f"scheduler.kind=wsd: how long is its decay? Set one of {keys}"]
    zero = [f"scheduler.{name}={value}: must be positive" for name, value in lengths.items() if value == 0]
    last_step = known_last_step(cfg)
    if zero or last_step is None:
        return zero
    try:
        sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
        warmup_and_decay_steps(scheduler, sizes, last_step)
    except UserError as error:
        return [str(error)]
    return []


def known_last_step(cfg: TrainConfig) -> int | None:
    """Last step of a run by trainer.max_steps and max_tokens, without reading the data.

    None: only trainer.max_epochs limits the run, or a value that the number of steps depends on is wrong.
    """
    limits = replace(cfg.trainer, max_epochs=None)
    values = (limits.max_steps, limits.max_tokens)
    given = [value for value in values if value is not None]
    sizes = [limits.global_batch_size, *(stage.global_batch_size for stage in limits.batch_size_warmup)]
    if not given or min(*given, *sizes, cfg.data.sequence_length) <= 0:
        return None
    return total_steps(limits, cfg.data.sequence_length)


def schedule_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about keys of kind=wsd with another kind, and phases that the run does not complete."""
    scheduler, defaults = cfg.scheduler, SchedulerConfig()
    if scheduler.kind is Schedule.wsd:
        return []
    unused = [
        f"scheduler.{name} has no effect: scheduler.kind is {scheduler.kind.value}"
        for name in OF_WSD
        if getattr(scheduler, name) != getattr(defaults, name)
    ]
    return unused + _unfinished_phases(cfg)


def _unfinished_phases(cfg: TrainConfig) -> list[str]:
    """Warnings about a warm-up or a decay that ends more than a step after the run."""
    scheduler, last_step = cfg.scheduler, known_last_step(cfg)
    if last_step is None:
        return []
    sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
    warmup_end, _, decay_end = warmup_and_decay_steps(scheduler, sizes, last_step)
    if warmup_end > last_step + 1:
        key = _key_of(cfg, ("warmup_steps", "warmup_tokens", "warmup_fraction"))
        what = f"the warm-up ends at step {warmup_end:,.10g}, and the run at step {last_step:,}"
        return [f"{key}: {what}, so the learning rate never reaches its peak; shorten the warm-up"]
    if scheduler.kind is Schedule.constant or decay_end <= last_step + 1:
        return []
    key = _key_of(cfg, ("decay_steps", "decay_tokens"))
    what = f"the decay ends at step {decay_end:,.10g}, and the run at step {last_step:,}"
    fix = f"shorten the decay (null: to the end of the run), or set {STOP} to run a part of a longer run"
    return [f"{key}: {what}, before the learning rate is at its final value; {fix}"]


def _key_of(cfg: TrainConfig, names: tuple[str, ...]) -> str:
    """The first of these keys of `scheduler` that is set, with its value."""
    name = next(name for name in names if getattr(cfg.scheduler, name) is not None)
    return f"scheduler.{name}={getattr(cfg.scheduler, name)}"
