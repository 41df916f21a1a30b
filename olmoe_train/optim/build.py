"""AdamW, its learning rate as a function of the step, and exact gradient clipping over sharded parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from olmoe_train.config.optimizer import AdamWConfig, OptimizerConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], cfg: OptimizerConfig
) -> torch.optim.AdamW:
    """Fused AdamW over every parameter, decay on all of them, norms and embeddings included (arXiv
    2409.02060, table 10)."""
    assert isinstance(cfg, AdamWConfig)
    return torch.optim.AdamW(
        parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
    )
