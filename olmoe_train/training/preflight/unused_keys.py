"""Warnings about options that are set and have no effect in this run."""

from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import BalanceScope, Strategy
from olmoe_train.config.data import OlmoFilesConfig, SourceConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.data.mixture import read_manifests


def _no_effect(cfg: TrainConfig) -> list[str]:
    warnings = []
    scope = cfg.balancing.scope if isinstance(cfg.balancing, AuxiliaryLossConfig) else None
    defaults = SourceConfig()
    for name, value in vars(cfg.data.source).items():
        if value != getattr(defaults, name):
            warnings.append(f"data.source.{name} has no effect here: `olmoe prepare` alone reads it")
    if cfg.data.olmo != OlmoFilesConfig():
        warnings.append("data.olmo has no effect here: `olmoe prepare` alone reads it")
    if len(cfg.data.mixture) == 1:
        warnings.append("data.mixture has one source: its weight has no effect")
    if cfg.data.mixture:
        warnings += [
            f"data.mixture: {name} has no validation split and is not evaluated"
            for name, manifest in read_manifests(cfg.data).items()
            if manifest.validation.tokens == 0
        ]
    if cfg.model.num_experts == 1:
        warnings += [
            f"loss.{name} has no effect: a dense model (model.num_experts=1) has no router to regularise"
            for name in ("router_aux_loss_coef", "router_z_loss_coef")
            if getattr(cfg.loss, name) != 0
        ]
    elif scope is BalanceScope.micro_batch and cfg.loss.router_aux_loss_coef == 0:
        warnings.append("balancing.scope has no effect: loss.router_aux_loss_coef is 0")
    if cfg.checkpoint.keep_every and not cfg.checkpoint.keep:
        warnings.append("checkpoint.keep_every has no effect: checkpoint.keep=0 keeps every checkpoint")
    if cfg.parallel.strategy is not Strategy.deepspeed:
        warnings += [
            f"parallel.{name} has no effect: parallel.strategy is {cfg.parallel.strategy.value}"
            for name in ("zero_stage", "offload", "deepspeed_config")
            if getattr(cfg.parallel, name) != getattr(ParallelConfig(), name)
        ]
    if cfg.model.trust_pickle and cfg.model.init_from is None:
        warnings.append("model.trust_pickle has no effect: model.init_from is null")
    if cfg.optimizer.max_grad_norm == 0:
        warnings.append("optimizer.max_grad_norm=0: gradients are not clipped")
    return warnings


def _gathering_without_effect(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Warnings about options of how weights are gathered, where none are."""
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
