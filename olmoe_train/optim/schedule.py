"""The learning rate as a function of the step: warm-up, then cosine, linear or constant."""

import math

import torch

from olmoe_train.config.choices import Schedule
from olmoe_train.config.train import SchedulerConfig


def learning_rate(step: int, peak: float, cfg: SchedulerConfig, warmup: float, decay: float) -> float:
    """Learning rate of optimizer step `step`, counted from 1, so that the last step of the decay gets the
    final value.

    Linear from warmup_start_factor x peak at step 0 to the peak at `warmup`, then cosine, linear or constant,
    reaching final_factor x peak at `decay` and staying there. The released run: 10% to peak in 10,485,760,000
    tokens, cosine to 10% at 5e12 tokens (arXiv 2409.02060, appendix B; OLMo's cosine_with_warmup).
    """
    if step < warmup:
        return peak * (cfg.warmup_start_factor + (1 - cfg.warmup_start_factor) * step / warmup)
    if cfg.kind is Schedule.constant:
        return peak
    progress = min(1.0, (step - warmup) / (decay - warmup)) if decay > warmup else 1.0
    shape = (1 + math.cos(math.pi * progress)) / 2 if cfg.kind is Schedule.cosine else 1 - progress
    return peak * (cfg.final_factor + (1 - cfg.final_factor) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
