"""Apply all parallelism to the model from outside, in this order:
expert parallelism -> activation checkpointing -> torch.compile -> FSDP2.

The strategies fsdp and ddp both use FSDP2 (`fully_shard`). With ddp every shard group is a single rank, so
parameters stay whole and only gradients are reduced. Gradients are summed over all ranks, never averaged: the
loss is already divided by counts over the whole global batch, whatever the share of each rank.
"""

from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.distributed.compile import compile_layers
from olmoe_train.distributed.expert_parallel import apply_expert_parallelism
from olmoe_train.distributed.fsdp import shard
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.model import OlmoeForCausalLM


def parallelize(
    model: OlmoeForCausalLM, trainer: TrainerConfig, parallel: ParallelConfig, mesh: Mesh
) -> OlmoeForCausalLM:
    """Apply the configured parallelism to a model, in place. Parameters become DTensors.

    Call this function before building the optimizer. Afterwards `materialize.materialize` allocates and fills
    a meta model.

    Args:
        model: The model, on the meta device or with weights.
        trainer: Reads precision, compile and activation_checkpointing.
        parallel: Strategy, resharding and prefetch. The sizes are already in `mesh`.
        mesh: The ranks, from `build_mesh`.

    Returns:
        `model`.
    """
    if mesh.expert is not None:
        apply_expert_parallelism(model, mesh.expert["expert"])
    checkpoint_activations(model, trainer.activation_checkpointing)
    if trainer.compile:
        compile_layers(model)
    shard(model, mesh, trainer.precision, parallel)
    return model
