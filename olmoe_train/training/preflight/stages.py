"""Checks of data.stages that involve other keys: borders in whole sequences, and the length of the run."""

from olmoe_train.config.objective import NextTokenConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.training.preflight.schedule import known_last_step


def stages_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with the stages of a run, one message per error."""
    if not cfg.data.stages:
        return []
    if not isinstance(cfg.objective, NextTokenConfig):
        what = f"stages are counted in tokens, and objective={cfg.objective.name} counts other samples"
        return [f"data.stages: {what}; set data.stages=[] and use data.mixture"]
    errors = []
    if cfg.trainer.max_epochs is not None:
        errors.append(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: data in stages has no epoch; set "
            "trainer.max_steps or trainer.max_tokens"
        )
    errors += _border_errors(cfg)
    return errors or _end_errors(cfg)


def _border_errors(cfg: TrainConfig) -> list[str]:
    """Whether the stages end one after the other, each after a whole sequence."""
    errors, length, before = [], cfg.data.sequence_length, 0
    for index, stage in enumerate(cfg.data.stages):
        key, until = f"data.stages[{index}].until_tokens", stage.until_tokens
        if until is None:
            if index < len(cfg.data.stages) - 1:
                errors.append(f"{key}=null: only the last stage may go on to the end of the run; set its end")
            continue
        if until <= before:
            what = f"the stage before ends at {before}" if index else "must be positive"
            errors.append(
                f"{key}={until}: {what}; stages end one after the other, at a number of tokens each"
            )
        elif length > 0 and until % length:
            below = until // length * length
            nearest = " or ".join(str(value) for value in (below, below + length) if value > before)
            errors.append(
                f"{key}={until}: is no multiple of data.sequence_length={length}, and a stage ends after a "
                f"whole sequence; the nearest: {nearest}"
            )
        before = until
    return errors


def _end_errors(cfg: TrainConfig) -> list[str]:
    """Whether the run goes on after the last stage. The stage may fill the last step."""
    until, last_step = cfg.data.stages[-1].until_tokens, known_last_step(cfg)
    if until is None or last_step is None or cfg.data.sequence_length <= 0:
        return []
    tokens = BatchSizes.of(cfg.trainer, cfg.data.sequence_length).tokens_after(last_step - 1)
    if tokens < until:
        return []
    key = f"data.stages[{len(cfg.data.stages) - 1}].until_tokens={until}"
    what = f"the last stage ends there, and step {last_step} of the run begins at token {tokens}"
    fix = "leave this until_tokens out, add a stage, or lower trainer.max_steps or max_tokens"
    return [f"{key}: {what}; {fix}"]


def stages_warnings(cfg: TrainConfig) -> list[str]:
    """Warnings about stages that the run does not reach."""
    last_step = known_last_step(cfg)
    if last_step is None:
        return []
    tokens = BatchSizes.of(cfg.trainer, cfg.data.sequence_length).tokens_after(last_step)
    return [
        f"data.stages[{index}] has no effect: it begins at token {stage.until_tokens}, and the run ends at "
        f"token {tokens}"
        for index, stage in enumerate(cfg.data.stages[:-1], start=1)
        if stage.until_tokens is not None and stage.until_tokens >= tokens
    ]
