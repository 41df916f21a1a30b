"""Checks of trainer.global_batch_size and trainer.batch_size_warmup."""

from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.training.preflight.schedule import known_last_step

WARMUP = "trainer.batch_size_warmup"


def batch_size_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is wrong with the batch sizes, one message per error."""
    trainer, errors, before = cfg.trainer, [], 0
    keys = {"trainer.global_batch_size": trainer.global_batch_size}
    for index, stage in enumerate(trainer.batch_size_warmup):
        key = f"{WARMUP}[{index}]"
        keys[f"{key}.global_batch_size"] = stage.global_batch_size
        if stage.global_batch_size <= 0:
            errors.append(f"{key}.global_batch_size={stage.global_batch_size}: must be positive")
        if stage.until_tokens <= before:
            what = f"the size before ends at {before}" if index else "must be positive"
            errors.append(f"{key}.until_tokens={stage.until_tokens}: {what}; sizes end one after the other")
        before = stage.until_tokens
    of_pass = trainer.micro_batch_size * world_size
    for key, size in keys.items():
        if of_pass > 0 and size > 0 and size % of_pass:
            nearest = max(1, round(size / of_pass)) * of_pass
            errors.append(
                f"{key}={size}: must be a multiple of trainer.micro_batch_size x ranks = "
                f"{trainer.micro_batch_size} x {world_size} = {of_pass}; the nearest is {nearest}"
            )
    if trainer.batch_size_warmup and not isinstance(cfg.objective, NextTokenConfig):
        what = f"it is counted in tokens, and objective={cfg.objective.name} counts other samples"
        errors.append(f"{WARMUP}: {what}; set {WARMUP}=[]")
    return errors


def batch_size_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about batch sizes that no step of the run has."""
    last_step = known_last_step(cfg)
    if last_step is None:
        return []
    sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
    used = {phase.size for phase in sizes.phases() if phase.step < last_step}
    keys = [f"{WARMUP}[{index}]" for index in range(len(sizes.warmup))] + ["trainer.global_batch_size"]
    return [
        f"{key}: no step has {size} sequences; the run ends at step {last_step}, and the sizes are, in "
        f"sequences: {sizes.in_words()}"
        for key, size in zip(keys, sizes.all, strict=True)
        if size not in used
    ]
