"""Checks of every number of ranks that an elastic launch may start, before one of them ends the run."""

import math
import os

from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.compose import plain_values
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.rendezvous import ELASTIC_RANKS
from olmoe_train.training.compatibility import counted_together
from olmoe_train.training.preflight.batch_sizes import batch_size_errors
from olmoe_train.training.preflight.parallel import parallel_errors


def elastic_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is wrong with the numbers of ranks other than `world_size` that --nnodes=MIN:MAX allows.

    Args:
        cfg: The config of the run.
        world_size: Number of ranks now, which is checked elsewhere.
    """
    allowed = [int(count) for count in os.environ.get(ELASTIC_RANKS, "").split(",") if count]
    wrong = {count: [*batch_size_errors(cfg, count), *parallel_errors(cfg, count)] for count in allowed}
    errors = [
        f"{count} rank{'s' * (count > 1)}, which torchrun's --nnodes allows: {error}"
        for count, of_count in wrong.items()
        if count != world_size
        for error in of_count
    ]
    if errors:
        fits = [str(count) for count in allowed if not wrong[count]]
        errors[-1] += f"\n    the configuration fits {', '.join(fits) or 'none'} of {_listed(allowed)} ranks"
        errors[-1] += _common_batch(cfg, allowed)
    elif allowed:
        errors = _loss_errors(cfg, allowed)
    return errors


def _common_batch(cfg: TrainConfig, allowed: list[int]) -> str:
    """The batch sizes that fit all numbers of ranks, where the size is what does not fit."""
    size, unit = cfg.trainer.global_batch_size, cfg.trainer.micro_batch_size * math.lcm(*allowed)
    if unit <= 0 or size % unit == 0:
        return ""
    near = sorted({max(1, size // unit) * unit, (size // unit + 1) * unit})
    return (
        f"; for all of them trainer.global_batch_size must be a multiple of {unit}, such as "
        f"{' or '.join(map(str, near))}"
    )


def _loss_errors(cfg: TrainConfig, allowed: list[int]) -> list[str]:
    """A load-balancing loss of the sequences of one pass is another one on other ranks."""
    config = plain_values(cfg)
    passes = {str(counted_together(config, count)) for count in allowed}
    if len(passes) == 1 or "balancing" in cfg.checkpoint.allow_changes:
        return []
    assert isinstance(cfg.balancing, AuxiliaryLossConfig)
    return [
        (
            f"balancing.scope={cfg.balancing.scope.value}: the loss depends on the sequences of one forward "
            f"pass of all ranks, and torchrun's --nnodes allows {_listed(allowed)} ranks; set "
            "balancing.scope=global_batch, or accept that with checkpoint.allow_changes=[balancing]"
        )
    ]


def _listed(allowed: list[int]) -> str:
    return ", ".join(map(str, allowed))
