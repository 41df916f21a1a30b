"""Builds the optimizer that `optimizer=...` names, and scales its learning rates."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from olmoe_train.config.choices import Precision
from olmoe_train.config.optimizer import (
    AdamWConfig,
    MuonConfig,
    NorMuonConfig,
    OptimizerConfig,
    RMSpropConfig,
)
from olmoe_train.optim.adamw_bf16 import AdamWBf16
from olmoe_train.optim.muon import Muon

Parameters = Iterable[nn.Parameter] | list[dict[str, Any]]
"""Parameters, or parameter groups."""


def build_adamw(parameters: Parameters, cfg: AdamWConfig) -> torch.optim.Optimizer:
    """AdamW over every parameter, fused where the moments are fp32. By default weight decay applies to all of
    them, norms and embeddings included (arXiv 2409.02060, table 10)."""
    if cfg.moments_dtype is Precision.bf16:
        return AdamWBf16(parameters, cfg)
    return torch.optim.AdamW(
        parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
    )


def build_rmsprop(parameters: Parameters, cfg: RMSpropConfig) -> torch.optim.Optimizer:
    """RMSprop over every parameter, one parameter at a time.

    torch has no fused RMSprop. foreach=True would hold the roots of all mean squares at once, 4 bytes per
    element of the rank's shard. The step count stays on the CPU (capturable=False), and no update depends on
    it.
    """
    return torch.optim.RMSprop(
        parameters,
        lr=cfg.lr,
        alpha=cfg.alpha,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        momentum=cfg.momentum,
        foreach=False,
    )


def build_muon(groups: Any, cfg: MuonConfig | NorMuonConfig) -> torch.optim.Optimizer:
    """Muon or NorMuon over the groups of `roles.parameter_groups`."""
    return Muon(groups, cfg)


OPTIMIZERS: dict[type[OptimizerConfig], Callable[[Parameters, Any], torch.optim.Optimizer]] = {
    AdamWConfig: build_adamw,
    MuonConfig: build_muon,
    NorMuonConfig: build_muon,
    RMSpropConfig: build_rmsprop,
}
"""Variant of `optimizer` -> its builder. A new optimizer is one configuration class and one entry here."""


def build_optimizer(parameters: Parameters, cfg: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a configuration. Each parameter group remembers its peak rate as `initial_lr`.

    Args:
        parameters: Parameters, or groups; Muon needs those of `roles.parameter_groups`.
        cfg: The optimizer's options.
    """
    optimizer = OPTIMIZERS[type(cfg)](parameters, cfg)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def scale_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set every group's learning rate to its `initial_lr` times `multiplier`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
