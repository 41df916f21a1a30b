"""The one place and order in which parallelism is put onto the model, from outside:
expert parallelism -> activation checkpointing -> torch.compile -> FSDP2.

Both strategies are FSDP2 (`fully_shard`): with ddp every rank is a shard group of its own, so parameters stay
whole and only gradients are reduced. Gradients are summed over all ranks, never averaged: the loss is already
divided by counts over the whole global batch, whatever each rank's share of them.
"""

from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.distributed.compile import compile_layers
from olmoe_train.distributed.expert_parallel import apply_expert_parallelism
from olmoe_train.distributed.fsdp import shard
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.model import OlmoeForCausalLM


def parallelize(model: OlmoeForCausalLM, cfg: TrainConfig, mesh: Mesh) -> OlmoeForCausalLM:
    """Apply the configured parallelism to a model, in place; parameters become DTensors.

    A meta model is then filled by `initialise`. Call before the optimizer is built.
    """
    if mesh.expert is not None:
        apply_expert_parallelism(model, mesh.expert["expert"])
    checkpoint_activations(model, cfg.trainer.activation_checkpointing)
    if cfg.trainer.compile:
        compile_layers(model)
    shard(model, mesh, cfg)
    return model
