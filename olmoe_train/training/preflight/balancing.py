"""Checks of `balancing` together with the model, the losses, the objective and the exports."""

from olmoe_train.config.adapter import NoAdapterConfig
from olmoe_train.config.balancing import LossFreeConfig, NoBalancingConfig, SequenceLossConfig
from olmoe_train.config.choices import Convention
from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.train import LossConfig, TrainConfig


def balancing_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with the balancing of a run, one message per error."""
    balancing, errors = cfg.balancing, []
    if key := _key_of_sequence_loss(cfg):
        if cfg.loss.convention is Convention.hf:
            errors.append(
                f"{key} with loss.convention=hf: that convention pools the layers, and the sequence-wise "
                "loss is one per layer; set another loss.convention"
            )
        if not isinstance(cfg.objective, NextTokenConfig):
            errors.append(
                f"{key} with objective={cfg.objective.name}: this objective packs its samples into rows by "
                "micro-batch, so the loss would depend on trainer.micro_batch_size; set balancing=aux"
            )
    if isinstance(balancing, LossFreeConfig) and cfg.model.num_experts == 1:
        errors.append(
            "balancing=loss_free with model.num_experts=1: a dense model has no router; set balancing=none"
        )
    if isinstance(balancing, LossFreeConfig) and cfg.checkpoint.export_every:
        errors.append(
            f"checkpoint.export_every={cfg.checkpoint.export_every} with balancing=loss_free: the format has "
            "no parameter for the bias; set checkpoint.export_every=0, and export with olmoe export fold=drop"
        )
    if not isinstance(cfg.adapter, NoAdapterConfig):
        changed = {"balancing=loss_free": isinstance(balancing, LossFreeConfig)}
        changed["balancing.router_temperature"] = balancing.router_temperature != 1
        errors += [
            f"{name} with adapter={cfg.adapter.name}: it changes the routing of the base, and the files of "
            "an adapter cannot hold that; remove it, or set adapter=none"
            for name, is_set in changed.items()
            if is_set
        ]
    return errors


def _key_of_sequence_loss(cfg: TrainConfig) -> str | None:
    """The key that gives the sequence-wise loss a weight; None: it has none."""
    if isinstance(cfg.balancing, LossFreeConfig) and cfg.balancing.sequence_coef:
        return f"balancing.sequence_coef={cfg.balancing.sequence_coef}"
    if isinstance(cfg.balancing, SequenceLossConfig) and cfg.loss.router_aux_loss_coef:
        return "balancing=sequence"
    return None


def balancing_without_effect(cfg: TrainConfig) -> list[str]:
    """Warnings about keys of the balancing that are set and change nothing."""
    balancing, coef = cfg.balancing, cfg.loss.router_aux_loss_coef
    if cfg.model.num_experts == 1:
        return [
            f"balancing.{name} has no effect: a dense model (model.num_experts=1) has no router"
            for name in ("router_jitter", "router_temperature", "bias_update_rate", "sequence_coef")
            if getattr(balancing, name, None) != getattr(type(balancing)(), name, None)
        ]
    warnings = []
    if isinstance(balancing, (LossFreeConfig, NoBalancingConfig)):
        # The default is no choice of the user.
        if coef not in (0, LossConfig().router_aux_loss_coef):
            warnings.append(
                f"loss.router_aux_loss_coef={coef} has no effect: balancing={balancing.name} has no such loss"
            )
    elif isinstance(balancing, SequenceLossConfig) and coef == 0:
        warnings.append("balancing=sequence has no effect: loss.router_aux_loss_coef=0")
    if isinstance(balancing, LossFreeConfig) and balancing.bias_update_rate == 0:
        warnings.append("balancing.bias_update_rate=0: the bias of balancing=loss_free does not change")
    return warnings
