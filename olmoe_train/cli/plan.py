"""Print what a training run would need: memory and traffic per GPU, which layouts fit, speed and duration.
Nothing is allocated; no data and no GPU are needed. All keys of `olmoe train` are accepted
(experiment=olmoe_1b_7b_0924, ...), and keys of the cluster: gpus, gpu_memory_gib, mfu. With check=true the
run is built on fake ranks instead, and each part of it is reported.
"""

import sys
from dataclasses import replace

from olmoe_train.cli.app import run_verb
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.report import layout_lines, memory_lines, run_lines, traffic_lines
from olmoe_train.training.preflight.checks import configuration_errors
from olmoe_train.utils.errors import configuration_error


def check(cfg: PlanConfig) -> None:
    """Check the configuration. The prepared data does not have to exist.

    Raises:
        UserError: The configuration is invalid; the message lists all errors.
    """
    errors = cluster_errors(cfg)
    trainer = cfg.trainer
    if trainer.max_epochs is not None and trainer.max_steps is None and trainer.max_tokens is None:
        errors.append(
            f"trainer.max_epochs={trainer.max_epochs}: a plan reads no data, so it does not know the length "
            "of an epoch; give trainer.max_steps or trainer.max_tokens"
        )
    if cfg.gpus > 0:
        errors += configuration_errors(cfg, cfg.gpus)
    if errors:
        raise configuration_error(errors)


def cluster_errors(cfg: PlanConfig) -> list[str]:
    """What is wrong with the keys that only a plan has, one message per error."""
    errors = []
    for key in ("gpus", "gpu_memory_gib", "mfu", "gpu_tflops"):
        value = getattr(cfg, key)
        if value is not None and value <= 0:
            errors.append(f"{key}={value}: must be positive")
    if cfg.mfu > 1:
        errors.append(f"mfu={cfg.mfu}: is a fraction of the GPU's peak, at most 1; 40% is mfu=0.4")
    if not 0 <= cfg.reserve_gib < cfg.gpu_memory_gib:
        errors.append(
            f"reserve_gib={cfg.reserve_gib}: must be at least 0 and below gpu_memory_gib={cfg.gpu_memory_gib}"
        )
    return errors


def is_valid(cfg: PlanConfig) -> bool:
    """Whether `olmoe train` would accept the configuration on cfg.gpus ranks."""
    return not configuration_errors(cfg, cfg.gpus)


def main(cfg: PlanConfig) -> None:
    """Print the plan, or check the run."""
    if cfg.check:
        if errors := cluster_errors(cfg):
            raise configuration_error(errors)
        from olmoe_train.cli.plan_check import check_run  # the whole of training; a plan does without it

        check_run(cfg)
        return
    check(cfg)
    cfg = replace(cfg, trainer=replace(cfg.trainer, max_epochs=None))
    if cfg.trainer.train_only is not None:
        print("warning: with trainer.train_only this is an upper bound: every weight counts as trained")
    parts = [run_lines(cfg), memory_lines(cfg), traffic_lines(cfg), layout_lines(cfg, is_valid)]
    print("\n\n".join("\n".join(lines) for lines in parts))


def run() -> int:
    """Run `olmoe plan` with the command line; returns the exit code."""
    return run_verb("plan", PlanConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
