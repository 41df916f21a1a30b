"""Warnings about keys that are set and have no effect in this run."""

from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import BalanceScope, Strategy
from olmoe_train.config.data import OlmoFilesConfig, SourceConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.data.manifest import Manifest
from olmoe_train.data.mixture import has_sources, sources_key
from olmoe_train.model.hf.hub import is_hub_name


def keys_without_effect(cfg: TrainConfig, manifests: dict[str, Manifest]) -> list[str]:
    """Warnings about keys of a valid config that are set and change nothing.

    Args:
        cfg: The config of the run.
        manifests: Those of the training data, by the name of their source.
    """
    warnings = []
    scope = cfg.balancing.scope if isinstance(cfg.balancing, AuxiliaryLossConfig) else None
    defaults = SourceConfig()
    for name, value in vars(cfg.data.source).items():
        if value != getattr(defaults, name):
            warnings.append(f"data.source.{name} has no effect here: only `olmoe prepare` reads it")
    if cfg.data.olmo != OlmoFilesConfig():
        warnings.append("data.olmo has no effect here: only `olmoe prepare` reads it")
    if len(cfg.data.mixture) == 1:
        warnings.append("data.mixture has only one source, so its weight has no effect")
    warnings += [
        f"data.stages[{index}].mixture has only one source, so its weight has no effect"
        for index, stage in enumerate(cfg.data.stages)
        if len(stage.mixture) == 1
    ]
    if has_sources(cfg.data):
        warnings += [
            f"{sources_key(cfg.data)}: {name} has no validation split, so it is not evaluated"
            for name, manifest in manifests.items()
            if manifest.validation.tokens == 0
        ]
    if cfg.model.num_experts == 1:
        warnings += [
            f"loss.{name} has no effect: a dense model (model.num_experts=1) has no router"
            for name in ("router_aux_loss_coef", "router_z_loss_coef")
            if getattr(cfg.loss, name) != 0
        ]
    elif scope not in (None, BalanceScope.global_batch) and cfg.loss.router_aux_loss_coef == 0:
        warnings.append("balancing.scope has no effect: loss.router_aux_loss_coef=0")
    if cfg.checkpoint.keep_every and not cfg.checkpoint.keep:
        warnings.append("checkpoint.keep_every has no effect: checkpoint.keep=0 keeps every checkpoint")
    warnings += deepspeed_keys_without_effect(cfg.parallel)
    if not cfg.logging.explain_spikes and not isinstance(cfg.objective, NextTokenConfig):
        warnings.append(
            f"logging.explain_spikes has no effect: objective={cfg.objective.name} explains no spikes"
        )
    warnings += _initial_weights_without_effect(cfg.model)
    if cfg.optimizer.max_grad_norm == 0 and not cfg.trainer.fused_backward:
        warnings.append("optimizer.max_grad_norm=0: gradients are not clipped")
    return warnings


def deepspeed_keys_without_effect(parallel: ParallelConfig) -> list[str]:
    """Warnings about keys of DeepSpeed that are set in another layout."""
    if parallel.strategy is Strategy.deepspeed:
        return []
    return [
        f"parallel.{name} has no effect: parallel.strategy is {parallel.strategy.value}"
        for name in ("zero_stage", "offload", "deepspeed_config")
        if getattr(parallel, name) != getattr(ParallelConfig(), name)
    ]


def _initial_weights_without_effect(model: ModelConfig) -> list[str]:
    if model.init_from is None:
        return [
            f"model.{name} has no effect: model.init_from is null"
            for name in ("revision", "trust_pickle", "strip_prefix")
            if getattr(model, name) != getattr(ModelConfig(), name)
        ]
    if model.revision is not None and not is_hub_name(model.init_from):
        return [f"model.revision has no effect: model.init_from={model.init_from} is no name on the hub"]
    return []


def gathering_without_effect(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Warnings about keys that control how weights are gathered, in a run that gathers none."""
    if parallel.strategy is not Strategy.fsdp:
        reason = f"parallel.strategy is {parallel.strategy.value}"
    elif world_size <= parallel.replicate_size:
        reason = "each rank has a whole copy of the model"
    else:
        return []
    return [
        f"parallel.{name} has no effect: {reason}"
        for name in ("reshard_after_forward", "prefetch")
        if getattr(parallel, name) != getattr(ParallelConfig(), name)
    ]
