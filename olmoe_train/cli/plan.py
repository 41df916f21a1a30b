"""Print what a training run would need: memory and traffic per GPU, which layouts fit, speed and duration,
and how often to save it. optimise=tokens_per_day ranks the layouts. Nothing is allocated; no data and no GPU
are needed. With check=true the run is built on fake ranks instead, and each part of it is reported. All keys
of `olmoe train` are accepted (experiment=olmoe_1b_7b_0924, ...), and keys of the cluster: gpus, gpu, mfu, ...
"""

import sys
from dataclasses import replace

from olmoe_train.cli.app import run_verb
from olmoe_train.config.choices import Optimise
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.cluster import cluster_errors
from olmoe_train.planning.goodput_report import goodput_lines
from olmoe_train.planning.ranking import best_layout, rank_layouts, ranking_lines, without_layout
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
        chosen = cfg if cfg.optimise is Optimise.none else without_layout(cfg)
        errors += configuration_errors(chosen, cfg.gpus)
    if errors:
        raise configuration_error(errors)


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
    if cfg.optimise is Optimise.none:
        layouts = layout_lines(cfg, is_valid)
    else:
        ranking = rank_layouts(cfg, is_valid)
        layouts = ranking_lines(cfg, ranking)
        cfg = best_layout(cfg, ranking).cfg  # the other parts are those of the best layout
    parts = [run_lines(cfg), memory_lines(cfg), traffic_lines(cfg), layouts, goodput_lines(cfg)]
    print("\n\n".join("\n".join(lines) for lines in parts))


def run() -> int:
    """Run `olmoe plan` with the command line; returns the exit code."""
    return run_verb("plan", PlanConfig, main, __doc__)


if __name__ == "__main__":
    sys.exit(run())
