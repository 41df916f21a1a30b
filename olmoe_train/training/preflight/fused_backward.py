"""Checks of trainer.fused_backward: can each parameter be updated before the other gradients exist?"""

from olmoe_train.config.choices import Strategy
from olmoe_train.config.optimizer import AdamWConfig
from olmoe_train.config.train import TrainConfig

KEY = "trainer.fused_backward=true"


def fused_backward_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is in the way of trainer.fused_backward. world_size: number of ranks."""
    trainer, optimizer = cfg.trainer, cfg.optimizer
    if not trainer.fused_backward:
        return []
    errors = []
    if world_size > 1:
        errors.append(
            f"is for one rank, and there are {world_size}, over which parallel.strategy=fsdp divides the "
            "gradients; leave out trainer.fused_backward"
        )
    if cfg.parallel.strategy is Strategy.deepspeed:
        errors.append("DeepSpeed makes the updates itself; set parallel.strategy=fsdp")
    if not isinstance(optimizer, AdamWConfig):
        errors.append(f"optimizer={optimizer.name} updates parameters together; set optimizer=adamw")
    if optimizer.max_grad_norm != 0:
        errors.append(
            f"optimizer.max_grad_norm={optimizer.max_grad_norm:g} clips by the norm of all gradients, which "
            "is known after the updates; set optimizer.max_grad_norm=0"
        )
    if trainer.global_batch_size != trainer.micro_batch_size or trainer.batch_size_warmup:
        errors.append(
            "a step must be one micro-batch; set trainer.global_batch_size and trainer.micro_batch_size to "
            "one number, and no trainer.batch_size_warmup"
        )
    for name, value in (("spike_sigmas", trainer.spike_sigmas), ("ema_decay", trainer.ema_decay)):
        if value is not None:
            errors.append(f"trainer.{name}={value:g} needs the whole step; set trainer.{name}=null")
    return [f"{KEY}: {error}" for error in errors]
