"""AdamW, its learning rate as a function of the step, and exact gradient clipping over sharded parameters."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmoe_train.choices import Schedule
from olmoe_train.config import OptimizerConfig, SchedulerConfig, TrainConfig
from olmoe_train.data.loader import TrainSamples
from olmoe_train.distributed.mesh import copies, local_tensor


def build_optimizer(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], cfg: OptimizerConfig
) -> torch.optim.AdamW:
    """Fused AdamW over every parameter, decay on all of them, norms and embeddings included (arXiv
    2409.02060, table 10)."""
    return torch.optim.AdamW(
        parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
    )


def tokens_per_step(cfg: TrainConfig) -> int:
    return cfg.trainer.global_batch_size * cfg.data.sequence_length


def total_steps(cfg: TrainConfig) -> int:
    """Optimizer steps of the whole run: trainer.max_steps, max_tokens or max_epochs, whichever ends it first.

    Tokens and epochs are rounded up to whole steps. Only max_epochs looks at the data.
    """
    limits = [cfg.trainer.max_steps] if cfg.trainer.max_steps is not None else []
    if cfg.trainer.max_tokens is not None:
        limits.append(math.ceil(cfg.trainer.max_tokens / tokens_per_step(cfg)))
    if cfg.trainer.max_epochs is not None:
        samples = round(cfg.trainer.max_epochs * TrainSamples(cfg.data, cfg.seed).epoch)
        limits.append(math.ceil(samples / cfg.trainer.global_batch_size))
    return min(limits)


def warmup_and_decay_steps(cfg: TrainConfig) -> tuple[float, float]:
    """(end of warm-up, end of decay) in optimizer steps; fractional where they are given in tokens."""
    scheduler, a_step = cfg.scheduler, tokens_per_step(cfg)
    decay = float(total_steps(cfg))
    if scheduler.decay_steps is not None:
        decay = float(scheduler.decay_steps)
    elif scheduler.decay_tokens is not None:
        decay = scheduler.decay_tokens / a_step
    if scheduler.warmup_steps is not None:
        return float(scheduler.warmup_steps), decay
    if scheduler.warmup_tokens is not None:
        return scheduler.warmup_tokens / a_step, decay
    return (scheduler.warmup_fraction or 0.0) * decay, decay


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


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, copies: Callable[[nn.Parameter], int] = copies
) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most max_norm (0: leave them); returns the
    norm before.

    fp32 scalar on the device; collective. Experts and the other parameters are sharded over different
    meshes, but each value of a parameter's gradient exists `copies` times in the world, so one all-reduce of
    local sums gives the exact norm.
    """
    trained = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    shards = [local_tensor(gradient) for _, gradient in trained]
    shares = torch.tensor([1 / copies(parameter) for parameter, _ in trained], device=shards[0].device)
    square = torch.stack(torch._foreach_norm(shards, 2, torch.float32)).square() @ shares
    dist.all_reduce(square)
    norm = square.sqrt()
    if max_norm > 0:
        torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
