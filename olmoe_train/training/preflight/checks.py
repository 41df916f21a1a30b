"""Cross-field checks of a training config, all reported together, before anything is allocated."""

from olmoe_train.config.train import TrainConfig
from olmoe_train.config.variants import variant_errors
from olmoe_train.training.preflight.backend import backend_errors, machine_errors
from olmoe_train.training.preflight.model_and_data import _data_errors, _model_errors
from olmoe_train.training.preflight.parallel import _deepspeed_file_errors, _parallel_errors
from olmoe_train.training.preflight.unused_keys import _gathering_without_effect, _no_effect
from olmoe_train.utils.errors import UserError


def validate(cfg: TrainConfig, world_size: int) -> list[str]:
    """Raise one UserError that lists everything wrong with `cfg` on `world_size` ranks, each with key, value
    and fix.

    Returns warnings: options that are set and have no effect in this run.
    """
    errors = [*configuration_errors(cfg, world_size), *_data_errors(cfg), *machine_errors(cfg)]
    if not errors:
        errors = _deepspeed_file_errors(cfg, world_size)
    if errors:
        count = f"{len(errors)} errors" if len(errors) > 1 else "1 error"
        raise UserError("\n  - ".join([f"{count} in the configuration:", *errors]))
    return [*_no_effect(cfg), *_gathering_without_effect(cfg.parallel, world_size)]


def configuration_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is wrong with `cfg` on `world_size` ranks, data.dir left aside; a message an error."""
    errors = [*_trainer_errors(cfg, world_size), *_schedule_errors(cfg), *_model_errors(cfg)]
    return [*errors, *variant_errors(cfg), *backend_errors(cfg)]


def _trainer_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    trainer, parallel, errors = cfg.trainer, cfg.parallel, []
    if trainer.max_steps is None and trainer.max_tokens is None and trainer.max_epochs is None:
        errors.append(
            "trainer.max_steps, max_tokens and max_epochs are all null: set one, so that the run ends"
        )
    positive = {
        "trainer.max_steps": trainer.max_steps,
        "trainer.max_tokens": trainer.max_tokens,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.stop_at_step": trainer.stop_at_step,
        "trainer.global_batch_size": trainer.global_batch_size,
        "trainer.micro_batch_size": trainer.micro_batch_size,
        "trainer.log_every": trainer.log_every,
        "logging.dead_expert_steps": cfg.logging.dead_expert_steps,
        "parallel.expert_parallel_size": parallel.expert_parallel_size,
        "parallel.replicate_size": parallel.replicate_size,
        "data.sequence_length": cfg.data.sequence_length - 1,  # one token has no next one to predict
        "evaluation.micro_batch_size": cfg.evaluation.micro_batch_size,
        "evaluation.max_sequences": cfg.evaluation.max_sequences,
        "checkpoint.max_failures": cfg.checkpoint.max_failures,
        "trainer.timeout": trainer.timeout,
        "trainer.spike_sigmas": trainer.spike_sigmas,
    }
    errors += [
        f"{key}={value}: must be positive"
        for key, value in positive.items()
        if value is not None and value <= 0
    ]
    not_negative = {
        "checkpoint.every": cfg.checkpoint.every,
        "checkpoint.keep": cfg.checkpoint.keep,
        "checkpoint.keep_every": cfg.checkpoint.keep_every,
        "checkpoint.export_every": cfg.checkpoint.export_every,
        "evaluation.every": cfg.evaluation.every,
        "trainer.max_skipped_steps": trainer.max_skipped_steps,
        "parallel.prefetch": parallel.prefetch,
        "data.num_workers": cfg.data.num_workers,
        "loss.router_aux_loss_coef": cfg.loss.router_aux_loss_coef,
        "loss.router_z_loss_coef": cfg.loss.router_z_loss_coef,
    }
    errors += [f"{key}={value}: must not be negative" for key, value in not_negative.items() if value < 0]
    a_pass = trainer.micro_batch_size * world_size
    if a_pass > 0 and trainer.global_batch_size % a_pass:
        nearest = max(1, round(trainer.global_batch_size / a_pass)) * a_pass
        errors.append(
            f"trainer.global_batch_size={trainer.global_batch_size}: must be a multiple of "
            f"trainer.micro_batch_size x ranks = {trainer.micro_batch_size} x {world_size} = "
            f"{a_pass}; the nearest is {nearest}"
        )
    errors += _parallel_errors(cfg, world_size)
    return errors


def _schedule_errors(cfg: TrainConfig) -> list[str]:
    scheduler, errors = cfg.scheduler, []
    for what, options in (
        ("warmup", ("warmup_steps", "warmup_tokens", "warmup_fraction")),
        ("decay", ("decay_steps", "decay_tokens")),
    ):
        chosen = [
            f"scheduler.{name}={getattr(scheduler, name)}"
            for name in options
            if getattr(scheduler, name) is not None
        ]
        if len(chosen) > 1:
            errors.append(
                f"{' and '.join(chosen)}: set only one of them and the others null; "
                f"they are the same {what} in other units"
            )
        errors += [f"{text}: must not be negative" for text in chosen if "=-" in text]
    for name in ("warmup_fraction", "warmup_start_factor", "final_factor"):
        value = getattr(scheduler, name)
        if value is not None and not 0 <= value <= 1:
            errors.append(f"scheduler.{name}={value}: must be between 0 and 1")
    return errors
