"""Builds the balancer that `balancing=...` names."""

from collections.abc import Callable

from olmoe_train.config.balancing import (
    AuxiliaryLossConfig,
    BalancingConfig,
    LossFreeConfig,
    NoBalancingConfig,
    SequenceLossConfig,
)
from olmoe_train.config.train import TrainConfig
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.balancing import AuxiliaryLosses, Balancer
from olmoe_train.model.moe.loss_free import LossFreeBias


def build_auxiliary_losses(cfg: TrainConfig, config: OlmoeConfig) -> Balancer:
    assert isinstance(cfg.balancing, AuxiliaryLossConfig)
    # With expert choice the load is even by construction, and the loss is only reported.
    weighted = config.routing == "token_choice"
    return AuxiliaryLosses(
        config.experts_per_token,
        cfg.loss.router_aux_loss_coef if weighted else 0.0,
        cfg.loss.router_z_loss_coef,
        cfg.loss.convention,
        cfg.balancing.scope,
    )


def build_loss_free(cfg: TrainConfig, config: OlmoeConfig) -> Balancer:
    assert isinstance(cfg.balancing, LossFreeConfig)
    losses = build_sequence_loss(cfg, config, cfg.balancing.sequence_coef)
    rate = cfg.balancing.bias_update_rate
    return LossFreeBias(config.num_hidden_layers, config.num_experts, rate, losses)


def build_sequence_loss(cfg: TrainConfig, config: OlmoeConfig, coef: float | None = None) -> AuxiliaryLosses:
    """coef: weight of the sequence-wise loss; None: loss.router_aux_loss_coef."""
    coef = cfg.loss.router_aux_loss_coef if coef is None else coef
    z_coef, convention = cfg.loss.router_z_loss_coef, cfg.loss.convention
    return AuxiliaryLosses(config.experts_per_token, 0.0, z_coef, convention, sequence_coef=coef)


def build_no_balancing(cfg: TrainConfig, config: OlmoeConfig) -> Balancer:
    return build_sequence_loss(cfg, config, coef=0.0)


BuildBalancer = Callable[[TrainConfig, OlmoeConfig], Balancer]
BALANCERS: dict[type[BalancingConfig], BuildBalancer] = {
    AuxiliaryLossConfig: build_auxiliary_losses,
    LossFreeConfig: build_loss_free,
    SequenceLossConfig: build_sequence_loss,
    NoBalancingConfig: build_no_balancing,
}
"""Variant of `balancing` -> its builder. A new balancer is one configuration class and one entry here."""


def build_balancer(cfg: TrainConfig, config: OlmoeConfig) -> Balancer:
    """The balancer that `balancing=...` names. config: the model's."""
    return BALANCERS[type(cfg.balancing)](cfg, config)
