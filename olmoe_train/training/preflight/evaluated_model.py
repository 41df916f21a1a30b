"""Checks of the options of `olmoe evaluate`: the layout of the model, and positive numbers."""

from pathlib import Path

from olmoe_train.config.choices import Strategy
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.config.verbs import EvaluateConfig
from olmoe_train.data.mixture import mixture_errors
from olmoe_train.model import OlmoeConfig
from olmoe_train.training.preflight.parallel import parallel_errors
from olmoe_train.training.preflight.unused_keys import deepspeed_keys_without_effect, gathering_without_effect


def option_errors(cfg: EvaluateConfig) -> list[str]:
    """What is wrong with the options, one message per error. Neither the model nor the data is read."""
    errors = mixture_errors(cfg.data)
    positive = {
        "evaluation.micro_batch_size": cfg.evaluation.micro_batch_size,
        "evaluation.max_sequences": cfg.evaluation.max_sequences,
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
