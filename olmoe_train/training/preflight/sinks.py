"""Checks of `logging` and of evaluation.prompts: packages that are missing, and keys without effect."""

from importlib.util import find_spec

from olmoe_train.config.choices import WandbMode
from olmoe_train.config.train import EvaluationConfig, TrainConfig, WandbConfig


def sink_errors(cfg: TrainConfig) -> list[str]:
    """Sinks whose package is missing, one message per sink."""
    wanted = {"tensorboard": cfg.logging.tensorboard, "trackio": cfg.logging.trackio}
    return [
        f"logging.{name}=true: the package {name} is not installed; run: pip install 'olmoe-train[{name}]', "
        f"or set logging.{name}=false"
        for name, is_wanted in wanted.items()
        if is_wanted and find_spec(name) is None
    ]


def sink_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about keys of `logging` and `evaluation` that are set and change nothing."""
    warnings, wandb = [], cfg.logging.wandb
    if wandb.mode is WandbMode.disabled:
        others = () if cfg.logging.trackio else ("project", "name")
        warnings += [
            f"logging.wandb.{key} has no effect: logging.wandb.mode is disabled"
            for key in ("entity", "group", "job_type", "tags", "notes", "axis", *others)
            if getattr(wandb, key) != getattr(WandbConfig(), key)
        ]
    evaluation = cfg.evaluation
    if not evaluation.prompts and evaluation.sample_tokens != EvaluationConfig().sample_tokens:
        warnings.append("evaluation.sample_tokens has no effect: evaluation.prompts is empty")
    return warnings
