"""Checks of the router analyses during training: their reference, and whether they have an effect."""

from olmoe_train.checkpoint.convert.stored_model import open_stored_model, split_step
from olmoe_train.config.choices import RoutingKind
from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.train import LoggingConfig, TrainConfig
from olmoe_train.data.manifest import Manifest
from olmoe_train.utils.errors import UserError


def has_router_analysis(cfg: TrainConfig, manifests: dict[str, Manifest]) -> bool:
    """Whether the run analyzes routing: logging.router_analysis_every asks for it, and there is something."""
    return cfg.logging.router_analysis_every > 0 and _obstacle(cfg, manifests) is None


def router_analysis_errors(cfg: TrainConfig, manifests: dict[str, Manifest]) -> list[str]:
    """What is wrong with logging.router_reference, one message per error."""
    reference = cfg.logging.router_reference
    if reference is None or not manifests or not has_router_analysis(cfg, manifests):
        return []
    directory, step = split_step(reference)
    try:
        config = open_stored_model(directory, step or "latest").config
    except UserError as error:
        return [f"logging.router_reference={reference}: {str(error).removeprefix(f'source={directory}: ')}"]
    return [
        f"logging.router_reference={reference}: has {name}={getattr(config, name)}, and model.{name} is "
        f"{getattr(cfg.model, name)}; only models of one architecture are compared"
        for name in ("num_hidden_layers", "num_experts", "num_experts_per_tok", "vocab_size")
        if getattr(config, name) != getattr(cfg.model, name)
    ]


def router_analysis_warnings(cfg: TrainConfig, manifests: dict[str, Manifest]) -> list[str]:
    """Warnings about keys of the router analyses that have no effect in this run."""
    logging, defaults = cfg.logging, LoggingConfig()
    if logging.router_analysis_every == 0:
        return [
            f"logging.{name} has no effect: logging.router_analysis_every=0"
            for name in ("router_analysis_sequences", "router_reference")
            if getattr(logging, name) != getattr(defaults, name)
        ]
    obstacle = _obstacle(cfg, manifests)
    return [] if obstacle is None else [f"logging.router_analysis_every has no effect: {obstacle}"]


def _obstacle(cfg: TrainConfig, manifests: dict[str, Manifest]) -> str | None:
    """Why routing cannot be analyzed in this run; None: it can be."""
    if cfg.model.num_experts == 1:
        return "a dense model (model.num_experts=1) has no router"
    if cfg.model.routing is RoutingKind.expert_choice:
        return "with model.routing=expert_choice tokens choose no experts"
    if not isinstance(cfg.objective, NextTokenConfig):
        return f"objective={cfg.objective.name}, and only objective=next_token has validation texts"
    if not any(manifest.validation.tokens for manifest in manifests.values()):
        return "the data has no validation split"
    return None
