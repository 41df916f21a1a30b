"""The run that `olmoe explain` explains: its configuration in the layout of this command, checked."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from olmoe_train.config.data import DataConfig
from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.saved_run import saved_train_config
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.config.verbs import ExplainConfig
from olmoe_train.data.mixture import mixture_components
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils.errors import UserError


def run_to_explain(cfg: ExplainConfig, run_dir: Path, has_checkpoint: bool) -> TrainConfig:
    """Return the configuration of a run, with the layout and the data directory of this command.

    Args:
        cfg: The options of the command.
        run_dir: The run directory.
        has_checkpoint: Whether the weights come from a checkpoint. Otherwise they are the initial ones.

    Raises:
        UserError: The run or its objective cannot be explained, or the layout or the data does not fit.
    """
    run = saved_train_config(run_dir)
    if not isinstance(run.objective, NextTokenConfig):
        raise UserError(
            f"source={run_dir}: a run with objective={run.objective.name}; only steps of "
            "objective=next_token can be explained, because other losses are not sums over documents"
        )
    # A checkpoint has all weights but those that an adapter is added to.
    is_whole = has_checkpoint and run.adapter.name == "none"
    run = replace(
        run,
        run_dir=str(run_dir),
        data=run.data if cfg.data_dir is None else replace(run.data, dir=cfg.data_dir),
        trainer=replace(run.trainer, device=cfg.device, compile=False),
        parallel=ParallelConfig(expert_parallel_size=cfg.expert_parallel_size),
        model=replace(run.model, init_from=None) if is_whole else run.model,
    )
    _check_layout(run_dir, run.trainer, cfg.expert_parallel_size)
    _check_data_directory(run_dir, run.data, cfg.data_dir)
    validate(run, dist.get_world_size())
    return run


def _check_layout(run_dir: Path, trainer: TrainerConfig, experts: int) -> None:
    """Refuse a number of ranks on which the micro-batches would be others than in the run."""
    world, micro_batch = dist.get_world_size(), trainer.micro_batch_size
    sizes = [*(stage.global_batch_size for stage in trainer.batch_size_warmup), trainer.global_batch_size]
    if odd := [size for size in sizes if size % (world * micro_batch)]:
        size = odd[0]
        raise UserError(
            f"{world} ranks cannot share the steps of {run_dir}: the {size} sequences of a step are "
            f"{size // micro_batch} micro-batches of {micro_batch}; use a number of ranks that divides "
            f"{size // micro_batch}"
        )
    if experts < 1 or world % experts:
        raise UserError(
            f"expert_parallel_size={experts}: must divide the number of ranks, which is {world}; start more "
            "ranks with --nproc N"
        )


def _check_data_directory(run_dir: Path, data: DataConfig, data_dir: str | None) -> None:
    """Refuse a directory that is not there, and say whether the run or the command line named it."""
    missing = [source.directory for source in mixture_components(data) if not source.directory.is_dir()]
    if not missing:
        return
    if data_dir is not None:
        raise UserError(f"data_dir={data_dir}: no directory {missing[0]}; give the prepared data of the run")
    relative = "" if missing[0].is_absolute() else f" in {Path.cwd()}"
    raise UserError(
        f"source={run_dir}: the run had data.dir={data.dir}, and there is no directory "
        f"{missing[0]}{relative}; give its prepared data as data_dir=DIR"
    )
