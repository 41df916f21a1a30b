"""Checks of a training config that involve several keys. All errors are reported together."""

from olmoe_train.config.train import TrainConfig
from olmoe_train.config.variants import variant_errors
from olmoe_train.data.manifest import Manifest
from olmoe_train.distributed.rendezvous import launcher_warnings
from olmoe_train.evaluation.tasks.build import task_errors
from olmoe_train.training.preflight.ablations import ablation_errors, ablation_warnings
from olmoe_train.training.preflight.adapter import adapter_errors, adapter_warnings
from olmoe_train.training.preflight.backend import backend_errors, machine_errors
from olmoe_train.training.preflight.balancing import balancing_errors, balancing_without_effect
from olmoe_train.training.preflight.batch_sizes import batch_size_errors, batch_size_warnings
from olmoe_train.training.preflight.branch import branch_errors, branch_warnings
from olmoe_train.training.preflight.elastic import elastic_errors
from olmoe_train.training.preflight.evaluation import sampling_errors, set_errors
from olmoe_train.training.preflight.fused_backward import fused_backward_errors
from olmoe_train.training.preflight.model_and_data import data_errors, model_errors
from olmoe_train.training.preflight.object_stores import store_errors, store_warnings
from olmoe_train.training.preflight.parallel import deepspeed_file_errors, parallel_errors
from olmoe_train.training.preflight.preference import (
    preference_data_errors,
    preference_errors,
    preference_warnings,
)
from olmoe_train.training.preflight.router_analysis import (
    router_analysis_errors,
    router_analysis_warnings,
)
from olmoe_train.training.preflight.schedule import schedule_errors, schedule_warnings
from olmoe_train.training.preflight.sinks import sink_errors, sink_warnings
from olmoe_train.training.preflight.stages import stages_errors, stages_warnings
from olmoe_train.training.preflight.train_only import train_only_errors, train_only_warnings
from olmoe_train.training.preflight.unused_keys import gathering_without_effect, keys_without_effect
from olmoe_train.utils.errors import configuration_error


def validate(cfg: TrainConfig, world_size: int) -> list[str]:
    """Check a config before the model is built.

    Args:
        cfg: The config of the run.
        world_size: Number of ranks.

    Returns:
        Warnings: keys that are set and have no effect in this run, and a launcher that cannot restart nodes.

    Raises:
        UserError: lists everything that is wrong, each with key, value and fix; also for other
            numbers of ranks that the launcher may start.
    """
    errors, manifests = run_errors(cfg, world_size, on_this_machine=True)
    errors += elastic_errors(cfg, world_size)
    if errors:
        raise configuration_error(errors)
    return [*run_warnings(cfg, world_size, manifests), *launcher_warnings()]


def run_errors(
    cfg: TrainConfig, world_size: int, on_this_machine: bool
) -> tuple[list[str], dict[str, Manifest]]:
    """Check a config and the data that it names.

    Args:
        cfg: The config of the run.
        world_size: Number of ranks.
        on_this_machine: Whether this machine will run it, so that its device and kernels are checked.

    Returns:
        One message per error, and the manifests of the training data by the name of their source.
    """
    of_model = model_errors(cfg)
    of_data, manifests = data_errors(cfg, check_tokens=not of_model)
    of_data += preference_data_errors(cfg, manifests)
    of_data += router_analysis_errors(cfg, manifests)
    of_data += set_errors(cfg.evaluation.sets, cfg.data, manifests)
    of_data += task_errors(cfg.evaluation.tasks)
    errors = [*_configuration_errors(cfg, world_size, of_model), *of_data]
    errors += machine_errors(cfg) if on_this_machine else []
    if not errors:
        errors = [*sampling_errors(cfg), *deepspeed_file_errors(cfg, world_size), *branch_errors(cfg)]
    return errors, manifests


def run_warnings(cfg: TrainConfig, world_size: int, manifests: dict[str, Manifest]) -> list[str]:
    """Warnings about a valid config: keys that have no effect, or another one than expected.

    Args:
        cfg: The config of the run.
        world_size: Number of ranks.
        manifests: Those of the training data, by the name of their source; empty if there is no data.
    """
    return [
        *keys_without_effect(cfg, manifests),
        *balancing_without_effect(cfg),
        *schedule_warnings(cfg),
        *stages_warnings(cfg),
        *batch_size_warnings(cfg),
        *branch_warnings(cfg),
        *ablation_warnings(cfg),
        *adapter_warnings(cfg),
        *train_only_warnings(cfg),
        *preference_warnings(cfg, manifests),
        *(router_analysis_warnings(cfg, manifests) if manifests else []),
        *gathering_without_effect(cfg.parallel, world_size),
        *sink_warnings(cfg),
        *store_warnings(cfg),
    ]


def configuration_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is wrong with a config on `world_size` ranks, one message per error. The data is not read."""
    return _configuration_errors(cfg, world_size, model_errors(cfg))


def _configuration_errors(cfg: TrainConfig, world_size: int, of_model: list[str]) -> list[str]:
    return [
        *_trainer_errors(cfg, world_size),
        *fused_backward_errors(cfg, world_size),
        *schedule_errors(cfg),
        *of_model,
        *variant_errors(cfg),
        *backend_errors(cfg),
        *ablation_errors(cfg),
        *adapter_errors(cfg, world_size),
        *train_only_errors(cfg),
        *balancing_errors(cfg),
        *preference_errors(cfg),
        *stages_errors(cfg),
        *sink_errors(cfg),
        *store_errors(cfg),
    ]


def _trainer_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    trainer, errors = cfg.trainer, []
    if trainer.max_steps is None and trainer.max_tokens is None and trainer.max_epochs is None:
        errors.append(
            "trainer.max_steps, max_tokens and max_epochs are all null: set one of them, so that the run ends"
        )
    errors += [f"{key}={value}: must be positive" for key, value in _positive(cfg).items() if value <= 0]
    errors += [
        f"{key}={value}: must not be negative" for key, value in _not_negative(cfg).items() if value < 0
    ]
    if cfg.data.sequence_length < 2:
        errors.append(
            f"data.sequence_length={cfg.data.sequence_length}: must be at least 2, because the last token of "
            "a sequence has no next token to predict"
        )
    if trainer.ema_decay is not None and not 0 < trainer.ema_decay < 1:
        errors.append(
            f"trainer.ema_decay={trainer.ema_decay}: must be above 0 and below 1, such as 0.999; null: off"
        )
    return errors + batch_size_errors(cfg, world_size) + parallel_errors(cfg, world_size)


def _positive(cfg: TrainConfig) -> dict[str, float]:
    """The keys that must be positive, with their values; without those that are null."""
    trainer, parallel = cfg.trainer, cfg.parallel
    values: dict[str, float | None] = {
        "trainer.max_steps": trainer.max_steps,
        "trainer.max_tokens": trainer.max_tokens,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.stop_at_step": trainer.stop_at_step,
        "trainer.global_batch_size": trainer.global_batch_size,
        "trainer.micro_batch_size": trainer.micro_batch_size,
        "trainer.log_every": trainer.log_every,
        "trainer.timeout": trainer.timeout,
        "trainer.rendezvous_timeout": trainer.rendezvous_timeout,
        "trainer.spike_sigmas": trainer.spike_sigmas,
        "logging.dead_expert_steps": cfg.logging.dead_expert_steps,
        "logging.alarms.collapse_steps": cfg.logging.alarms.collapse_steps,
        "logging.router_analysis_sequences": cfg.logging.router_analysis_sequences,
        "parallel.expert_parallel_size": parallel.expert_parallel_size,
        "parallel.replicate_size": parallel.replicate_size,
        "evaluation.micro_batch_size": cfg.evaluation.micro_batch_size,
        "evaluation.max_sequences": cfg.evaluation.max_sequences,
        "evaluation.max_questions": cfg.evaluation.max_questions,
        "evaluation.tokens_per_pass": cfg.evaluation.tokens_per_pass,
        "evaluation.sample_tokens": cfg.evaluation.sample_tokens,
        "checkpoint.max_failures": cfg.checkpoint.max_failures,
        "data.cache_gb": cfg.data.cache_gb,
        "data.cache_block_kib": cfg.data.cache_block_kib,
    }
    return {key: value for key, value in values.items() if value is not None}


def _not_negative(cfg: TrainConfig) -> dict[str, float]:
    """The keys that must not be negative, with their values."""
    return {
        "checkpoint.every": cfg.checkpoint.every,
        "checkpoint.keep": cfg.checkpoint.keep,
        "checkpoint.keep_every": cfg.checkpoint.keep_every,
        "checkpoint.export_every": cfg.checkpoint.export_every,
        "evaluation.every": cfg.evaluation.every,
        "logging.details_every": cfg.logging.details_every,
        "logging.alarms.dead_experts": cfg.logging.alarms.dead_experts,
        "logging.alarms.skipped_steps": cfg.logging.alarms.skipped_steps,
        "logging.router_analysis_every": cfg.logging.router_analysis_every,
        "trainer.max_skipped_steps": cfg.trainer.max_skipped_steps,
        "parallel.prefetch": cfg.parallel.prefetch,
        "data.num_workers": cfg.data.num_workers,
        "loss.router_aux_loss_coef": cfg.loss.router_aux_loss_coef,
        "loss.router_z_loss_coef": cfg.loss.router_z_loss_coef,
    }
