"""Bytes of a run's checkpoints and exports on disk, and how many of them there are at a time."""

import math
from dataclasses import dataclass

from olmoe_train.config.choices import Strategy
from olmoe_train.config.optimizer import OptimizerConfig
from olmoe_train.config.train import CheckpointConfig
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.adapter import AdapterPlan
from olmoe_train.planning.flops import parameter_counts
from olmoe_train.planning.layout import FP32, ParallelLayout, count_units
from olmoe_train.planning.memory_optimizer import state_bytes


@dataclass(frozen=True)
class DiskPlan:
    """What a run keeps on disk."""

    checkpoint: int
    """Bytes of one checkpoint."""
    checkpoints: int
    """Most checkpoints at a time."""
    export: int
    """Bytes of one export."""
    exports: int
    """Exports over the whole run, none of which is deleted."""

    @property
    def total(self) -> int:
        """Most bytes at a time."""
        return self.checkpoint * self.checkpoints + self.export * self.exports


def checkpoint_bytes(
    config: OlmoeConfig, adapter: AdapterPlan | None, optimizer: OptimizerConfig, averaged: bool
) -> int:
    """Bytes of the tensors of one checkpoint, in every layout: trained weights in fp32, the optimizer's
    state, and with trainer.ema_decay the average of the weights (checkpoint/sharded.py)."""
    units = count_units(config, ParallelLayout(Strategy.fsdp, 1), adapter)
    return (1 + averaged) * FP32 * units.trained + state_bytes(config, units.roles, optimizer)


def most_checkpoints(cfg: CheckpointConfig, last_step: int | None) -> int:
    """The most checkpoints that a run has on disk at a time.

    The oldest is deleted after the newest is complete, so there is one more than checkpoint.keep.

    Args:
        cfg: The section `checkpoint`.
        last_step: Last step of the run; None: not known, and then checkpoints that are kept for ever count as
            one.
    """
    last = last_step or 1
    saved = _multiples((cfg.every, cfg.export_every), last, end=True)
    if not cfg.keep:
        return saved
    kept = [math.lcm(cfg.keep_every, step) for step in (cfg.every, cfg.export_every) if step]
    for_ever = _multiples(kept, last, end=False) if cfg.keep_every else 0
    newest = cfg.keep + 1
    return min(saved, newest + for_ever) if last_step is not None else newest + for_ever


def _multiples(periods: tuple[int, ...] | list[int], last: int, end: bool) -> int:
    """How many steps up to `last` are a multiple of one of at most two periods; 0 as a period is none.

    end: whether `last` counts in any case.
    """
    given = [period for period in periods if period]
    count = sum(last // period for period in given)
    if len(given) > 1:
        count -= last // math.lcm(*given)
    is_counted = any(last % period == 0 for period in given)
    return count + (end and not is_counted)


def disk_plan(
    cfg: CheckpointConfig,
    config: OlmoeConfig,
    adapter: AdapterPlan | None,
    optimizer: OptimizerConfig,
    averaged: bool,
    last_step: int | None,
) -> DiskPlan:
    """What a run keeps on disk. The arguments are those of the functions above; exports are in fp32, as the
    weights are stored (checkpoint/convert/export.py)."""
    return DiskPlan(
        checkpoint=checkpoint_bytes(config, adapter, optimizer, averaged),
        checkpoints=most_checkpoints(cfg, last_step),
        export=FP32 * parameter_counts(config).total,
        exports=(last_step or 0) // cfg.export_every if cfg.export_every else 0,
    )
