"""Compute the log-probabilities of the reference for preference tuning, and store them.

It takes the overrides of `olmoe train`. A training run with the same model.init_from, data.dir and
objective.logprobs_dir reads what is stored. Without this command the run computes them before its first step.
"""

import sys
from functools import partial

import torch
import torch.distributed as dist

from olmoe_train.cli.app import run_verb
from olmoe_train.cli.help import description
from olmoe_train.cli.ranks import on_ranks
from olmoe_train.config.choices import Reference
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.config.verbs import LogprobsConfig
from olmoe_train.distributed.mesh import build_mesh, init_distributed
from olmoe_train.distributed.rendezvous import leave_distributed
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.training.build import build_data, build_model
from olmoe_train.training.build_objective import (
    build_cached_reference,
    build_reference_model,
    logprobs_directory,
)
from olmoe_train.training.initial_weights import download_initial_weights
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils.errors import UserError


def main(cfg: LogprobsConfig) -> None:
    """Compute and store the log-probabilities, or check those that are stored."""
    device = init_distributed(cfg.trainer.device.value, cfg.trainer.rendezvous_timeout)
    try:
        write(cfg, device)
    finally:
        leave_distributed(cfg.trainer.rendezvous_timeout)


def write(cfg: LogprobsConfig, device: torch.device) -> None:
    """`main` within a process group."""
    objective = cfg.objective
    if not isinstance(objective, PreferenceConfig):
        raise UserError(f"objective={objective.name}: has no reference; set objective=preference")
    if objective.reference_kind is not Reference.cached:
        raise UserError(
            f"objective.reference={objective.reference_kind.value}: log-probabilities are stored for "
            "objective.reference=cached"
        )
    validate(cfg, dist.get_world_size())
    download_initial_weights(cfg.model)
    model = build_reference_or_adapted(cfg, device)
    stored = build_cached_reference(cfg, objective, model, build_data(cfg), device)
    directory = logprobs_directory(cfg, objective)
    if dist.get_rank() == 0:
        print(
            f"log-probabilities of {len(stored.train_D):,} completions for training and "
            f"{len(stored.validation_D):,} for validation: {directory}"
        )
        print(f"train with the same overrides, and objective.logprobs_dir={directory}")


def build_reference_or_adapted(cfg: LogprobsConfig, device: torch.device) -> OlmoeForCausalLM:
    """The reference: with an adapter, the model in the form in which the run holds it."""
    if cfg.adapter.name == "none":
        return build_reference_model(cfg, device)
    return build_model(cfg, build_mesh(cfg.parallel, device))


def run() -> int:
    """Run `olmoe logprobs` with the command line; returns the exit code."""
    return on_ranks(
        "olmoe_train.cli.logprobs",
        partial(run_verb, "logprobs", LogprobsConfig, main, description("logprobs", __doc__)),
    )


if __name__ == "__main__":
    sys.exit(run())
