"""Builds the objective of a run, and the reference that its loss compares with, from the configuration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from olmoe_train.config.choices import ActivationCheckpointing, Strategy
from olmoe_train.config.choices import Reference as ReferenceKind
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.objective import GrpoConfig, NextTokenConfig, ObjectiveConfig, PreferenceConfig
from olmoe_train.config.train import ParallelConfig, TrainConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.manifest import TOKENIZER
from olmoe_train.data.mixture import mixture_components
from olmoe_train.data.preferences import CollatePreferences
from olmoe_train.distributed.materialize import materialize
from olmoe_train.distributed.mesh import build_mesh
from olmoe_train.distributed.parallelize import parallelize
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.add import adapter_off, freeze_base
from olmoe_train.planning.adapter import meta_model
from olmoe_train.training.initial_weights import fill_model
from olmoe_train.training.objectives.base import Heartbeat, Objective
from olmoe_train.training.objectives.grpo import Grpo
from olmoe_train.training.objectives.next_token import NextToken
from olmoe_train.training.objectives.preference import Preference
from olmoe_train.training.objectives.reference import (
    CachedReference,
    LiveReference,
    NoReference,
    Reference,
    ReferenceModel,
    model_without_adapter,
    second_model,
)
from olmoe_train.training.objectives.reference_cache import cached_reference, identity_of
from olmoe_train.training.objectives.rewards import build_reward


def build_next_token(
    cfg: TrainConfig,
    model: OlmoeForCausalLM,
    data: TrainingData,
    device: torch.device,
    with_heartbeat: Heartbeat,
) -> Objective:
    return NextToken(model, device)


def build_preference(
    cfg: TrainConfig,
    model: OlmoeForCausalLM,
    data: TrainingData,
    device: torch.device,
    with_heartbeat: Heartbeat,
) -> Objective:
    assert isinstance(cfg.objective, PreferenceConfig)
    reference = build_reference(cfg, cfg.objective, model, data, device, with_heartbeat)
    return Preference(cfg.objective, model, reference, cfg.trainer.global_batch_size, device)


def build_reference(
    cfg: TrainConfig,
    objective: PreferenceConfig,
    model: OlmoeForCausalLM,
    data: TrainingData,
    device: torch.device,
    with_heartbeat: Heartbeat = iter,
) -> Reference:
    """The reference that objective.reference names. Collective.

    Args:
        cfg: The run's.
        objective: `cfg.objective`.
        model: The model to train, with its initial weights.
        data: The data of the run.
        device: The device of this rank.
        with_heartbeat: Wraps the batches of the pass that computes log-probabilities to store.

    Raises:
        UserError: Stored log-probabilities belong to another model or other data.
    """
    kind = objective.reference_kind
    if kind is ReferenceKind.none:
        return NoReference()
    if kind is ReferenceKind.cached:
        return build_cached_reference(cfg, objective, model, data, device, with_heartbeat)
    if model.adapter is not None:
        return LiveReference(model_without_adapter)
    return LiveReference(second_model(build_reference_model(cfg, device)))


def build_cached_reference(
    cfg: TrainConfig,
    objective: PreferenceConfig,
    model: OlmoeForCausalLM,
    data: TrainingData,
    device: torch.device,
    with_heartbeat: Heartbeat = iter,
) -> CachedReference:
    """Stored log-probabilities, computed if they are missing. The arguments are those of build_reference."""
    precision = cfg.trainer.precision
    identity = identity_of(model, cfg.model, cfg.adapter, precision, cfg.seed, data)
    directory = logprobs_directory(cfg, objective)
    with initial_reference(model, cfg) as reference:
        return cached_reference(
            reference, identity, cfg.trainer, cfg.evaluation, data, directory, device, with_heartbeat
        )


def logprobs_directory(cfg: TrainConfig, objective: PreferenceConfig) -> Path:
    """Where the log-probabilities of the reference are stored."""
    if objective.logprobs_dir is not None:
        return Path(objective.logprobs_dir).expanduser()
    return Path(cfg.run_dir).expanduser() / "logprobs"


@contextmanager
def initial_reference(model: OlmoeForCausalLM, cfg: TrainConfig) -> Iterator[OlmoeForCausalLM]:
    """The reference as a model with initial weights: a new adapter is off, one of model.adapter_from is
    on."""
    if model.adapter is not None and cfg.model.adapter_from is None:
        with adapter_off(model):
            yield model
    else:
        yield model


def build_reference_model(cfg: TrainConfig, device: torch.device) -> OlmoeForCausalLM:
    """A frozen model with the weights of model.init_from, sharded like the model that is trained. Collective.

    Its weights are held in the data type of the computation. With DeepSpeed, which needs an optimizer, FSDP2
    shards the reference over the same ranks.
    """
    parallel = cfg.parallel
    if parallel.strategy is Strategy.deepspeed:
        parallel = ParallelConfig(expert_parallel_size=parallel.expert_parallel_size)
    mesh = build_mesh(parallel, device)
    model = meta_model(olmoe_config(cfg.model), None, cfg.trainer.precision)
    model.requires_grad_(False)
    freeze_base(model, cfg.trainer.precision.dtype, quantized=False)
    model.set_experts_backend(cfg.model.experts_backend.value)
    trainer = replace(cfg.trainer, activation_checkpointing=ActivationCheckpointing.none)
    parallelize(model, trainer, parallel, mesh)
    materialize(model, mesh.device, cfg.seed)
    if cfg.model.init_from is not None:
        fill_model(model, cfg.model)
    return model


def build_grpo(
    cfg: TrainConfig,
    model: OlmoeForCausalLM,
    data: TrainingData,
    device: torch.device,
    with_heartbeat: Heartbeat,
) -> Objective:
    assert isinstance(cfg.objective, GrpoConfig)
    reference: ReferenceModel | None = None
    if cfg.objective.kl_coef and model.adapter is not None:
        reference = model_without_adapter
    elif cfg.objective.kl_coef:
        reference = second_model(build_reference_model(cfg, device))
    manifest = next(iter(data.manifests.values()))
    tokenizer = mixture_components(cfg.data)[0].directory / TOKENIZER / "tokenizer.json"
    return Grpo(
        cfg.objective,
        model,
        build_reward(cfg.objective),
        reference,
        Tokenizer.from_file(str(tokenizer)),
        CollatePreferences(cfg.data, manifest.padding),
        cfg.trainer.global_batch_size,
        cfg.seed,
        device,
    )


BuildObjective = Callable[[TrainConfig, OlmoeForCausalLM, TrainingData, torch.device, Heartbeat], Objective]
OBJECTIVES: dict[type[ObjectiveConfig], BuildObjective] = {
    NextTokenConfig: build_next_token,
    PreferenceConfig: build_preference,
    GrpoConfig: build_grpo,
}
"""Variant of `objective` -> its builder. A new objective is one configuration class and one entry here."""


def build_objective(
    cfg: TrainConfig,
    model: OlmoeForCausalLM,
    data: TrainingData,
    device: torch.device,
    with_heartbeat: Heartbeat = iter,
) -> Objective:
    """The objective that `objective=...` names. Collective.

    Args:
        cfg: The run's.
        model: With its balancer, and with its initial weights, also in a run that will resume.
        data: The data of the run.
        device: The device of this rank.
        with_heartbeat: Wraps the batches of a pass over the data before the first step.
    """
    return OBJECTIVES[type(cfg.objective)](cfg, model, data, device, with_heartbeat)
