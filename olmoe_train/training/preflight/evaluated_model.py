"""Checks of the options of `olmoe evaluate`: what there is to evaluate, the layout, and positive numbers."""

from pathlib import Path

from olmoe_train.config.choices import Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.config.verbs import EvaluateConfig
from olmoe_train.data.mixture import only_directory
from olmoe_train.data.source_errors import mixture_errors
from olmoe_train.evaluation.tasks.build import task_errors
from olmoe_train.evaluation.tasks.overlap import open_training_split
from olmoe_train.model import OlmoeConfig
from olmoe_train.training.preflight.parallel import parallel_errors
from olmoe_train.training.preflight.unused_keys import deepspeed_keys_without_effect, gathering_without_effect
from olmoe_train.utils.errors import UserError


def text_data(cfg: EvaluateConfig) -> DataConfig | None:
    """The data whose tokenizer all texts share: data.dir, or without it the first one of evaluation.sets.
    None: there are only tasks."""
    if cfg.data.dir:
        return cfg.data
    sets = cfg.evaluation.sets
    return only_directory(cfg.data, Path(sets[0].dir).expanduser()) if sets else None


def option_errors(cfg: EvaluateConfig) -> list[str]:
    """What is wrong with the options, one message per error. Neither a model nor the data is read."""
    errors = mixture_errors(cfg.data) + task_errors(cfg.evaluation.tasks)
    if not (cfg.data.dir or cfg.evaluation.sets or cfg.evaluation.tasks or cfg.evaluation.prompts):
        errors.append(
            "there is nothing to evaluate: give prepared data (data.dir=DIR), evaluation.tasks=[...] or "
            "evaluation.sets=[...]"
        )
    if repeated := sorted({name for name in cfg.source if cfg.source.count(name) > 1}):
        errors.append(f"source: {', '.join(repeated)} is there twice")
    errors += _overlap_errors(cfg)
    positive = {
        "evaluation.micro_batch_size": cfg.evaluation.micro_batch_size,
        "evaluation.max_sequences": cfg.evaluation.max_sequences,
        "evaluation.max_questions": cfg.evaluation.max_questions,
        "evaluation.tokens_per_pass": cfg.evaluation.tokens_per_pass,
        "evaluation.sample_tokens": cfg.evaluation.sample_tokens,
        "parallel.expert_parallel_size": cfg.parallel.expert_parallel_size,
        "parallel.replicate_size": cfg.parallel.replicate_size,
    }
    errors += [
        f"{key}={value}: must be positive"
        for key, value in positive.items()
        if value is not None and value < 1
    ]
    if cfg.parallel.prefetch < 0:
        errors.append(f"parallel.prefetch={cfg.parallel.prefetch}: must not be negative")
    if cfg.parallel.strategy is Strategy.deepspeed:
        errors.append(
            "parallel.strategy=deepspeed: DeepSpeed's engine shards weights only beside an optimizer, and an "
            "evaluation has none; set parallel.strategy=fsdp or ddp, which read checkpoints of every layout"
        )
    if cfg.out is not None and not (parent := Path(cfg.out).expanduser().absolute().parent).is_dir():
        errors.append(f"out={cfg.out}: there is no directory {parent}; create it, or give another file")
    return errors


def _overlap_errors(cfg: EvaluateConfig) -> list[str]:
    if cfg.check_overlap is None:
        return []
    if not cfg.evaluation.tasks:
        return [f"check_overlap={cfg.check_overlap}: there are no questions; give evaluation.tasks=[...]"]
    try:
        open_training_split(Path(cfg.check_overlap).expanduser())
    except UserError as error:
        return [str(error)]
    return []


def layout_errors(parallel: ParallelConfig, config: OlmoeConfig, world_size: int) -> list[str]:
    """What keeps a model from being laid out on `world_size` ranks, one message per error."""
    model = ModelConfig(
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
    )
    return parallel_errors(TrainConfig(parallel=parallel, model=model), world_size)


def layout_warnings(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Warnings about keys of `parallel` that are set and change nothing."""
    return deepspeed_keys_without_effect(parallel) + gathering_without_effect(parallel, world_size)
