"""FSDP2: units of parameters, their sharding, and the prefetch of weights."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from olmoe_train.config.choices import Precision, Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.decoder_layer import OlmoeDecoderLayer


def shard(model: OlmoeForCausalLM, mesh: Mesh, precision: Precision, parallel: ParallelConfig) -> None:
    """Apply FSDP2 over the mesh, in place.

    Each decoder layer is one unit. Embedding, final norm and head belong to the root unit. With expert
    parallelism the experts of a layer are a separate unit, sharded over the ranks that hold the same experts.
    In bf16 the router of a layer is a separate unit, too.

    With precision bf16, fp32 parameters are cast to bf16 when they are gathered, and gradients are
    summed in fp32.

    Args:
        model: The model, after activation checkpointing and torch.compile.
        mesh: The ranks.
        precision: Precision of the computation.
        parallel: Strategy, resharding and prefetch.
    """
    policy = MixedPrecisionPolicy()
    if precision is Precision.bf16:
        # The model's code casts to fp32 where necessary. With cast_forward_inputs, FSDP would cast every
        # layer input to bf16.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    layers = []
    for layer in model.decoder_layers:
        layers.append(_shard_layer(layer, mesh, policy, parallel.reshard_after_forward))
    _prefetch(layers, parallel.prefetch if parallel.strategy is Strategy.fsdp else 0)
    data = _data_mesh(mesh.dense, "shard")
    kept = _kept_as_they_are(model, mesh.dense["shard"].size(), policy.param_dtype)
    fully_shard(model, mesh=data, mp_policy=policy, reshard_after_forward=False, ignored_params=kept)
    register_fsdp_forward_method(model, "training_forward")
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            # Reduce gradients by a plain sum. With only the divide factor set, FSDP requests a
            # pre-multiplied sum, which only NCCL supports.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Give the model its sharded parameters, which the optimizer knows.

    A forward pass without backward leaves gathered ones, for example the pass of the reference.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def _shard_layer(
    layer: OlmoeDecoderLayer, mesh: Mesh, policy: MixedPrecisionPolicy, reshard: bool
) -> list[FSDPModule]:
    """Shard one layer and return its units; the unit of the layer itself is the first."""
    data = _data_mesh(mesh.dense, "shard")
    units = []
    if policy.param_dtype is not None:
        # The router's weights and gradients stay fp32, and a unit has one dtype. A router is small, so its
        # gathered weights are kept until backward.
        kept = _kept_as_they_are(layer.mlp.gate, mesh.dense["shard"].size())
        units.append(fully_shard(layer.mlp.gate, mesh=data, reshard_after_forward=False, ignored_params=kept))
    if mesh.expert is not None:
        expert_ranks = mesh.expert["expert_shard"].size()
        experts = fully_shard(
            layer.mlp.experts,
            mesh=_data_mesh(mesh.expert, "expert_shard"),
            shard_placement_fn=lambda parameter: inside_experts(expert_ranks, parameter.shape),
            mp_policy=policy,
            reshard_after_forward=reshard and _gathered(mesh.expert, "expert_shard"),
            ignored_params=_kept_as_they_are(layer.mlp.experts, expert_ranks, policy.param_dtype),
        )
        units.append(experts)
    ranks = mesh.dense["shard"].size()
    unit = fully_shard(
        layer,
        mesh=data,
        shard_placement_fn=lambda parameter: (
            Shard(1) if shards_within_experts(parameter.shape, ranks) else None
        ),
        mp_policy=policy,
        reshard_after_forward=reshard and _gathered(mesh.dense, "shard"),
        ignored_params=_kept_as_they_are(layer, ranks, policy.param_dtype),
    )
    return [unit, *units]


def inside_experts(ranks: int, shape: torch.Size) -> Shard:
    """Placement of a parameter of the experts: the expert dimension is already sharded over the expert ranks.

    FSDP2 requires that the ranks divide the dimension. The rank of an adapter may not be a multiple of the
    ranks; its lora_A is then sharded along its last dimension.
    """
    return Shard(1 if shape[1] % ranks == 0 else 2)


def _kept_as_they_are(module: nn.Module, ranks: int, compute: torch.dtype | None = None) -> set[nn.Parameter]:
    """The parameters that FSDP2 leaves alone: the frozen ones, if a rank has a whole copy.

    The base of an adapter already has the dtype of the computation. FSDP2 would copy it, from a shard that is
    the whole parameter. With trainer.train_only frozen weights stay fp32, and FSDP2 casts its copies.

    Args:
        module: The module.
        ranks: Number of ranks that share one copy.
        compute: Dtype of the computation. None: that of each parameter.
    """
    if ranks > 1:
        return set()
    return {p for p in module.parameters() if not p.requires_grad and compute in (None, p.dtype)}


def _prefetch(layers: list[list[FSDPModule]], ahead: int) -> None:
    """Prefetch the weights of the next `ahead` layers, in forward and in backward.

    In forward a layer also requests the weights of its own experts before attention, so that the weights
    arrive while attention runs. If the layer requested them later, dispatch would block the host first. In
    backward the experts are gathered when autograd reaches them. The experts must not be in the backward list
    of their own layer: FSDP2 processes that list a second time when the router's gradient arrives, and would
    gather experts whose backward is already finished.

    Args:
        layers: The units of each layer; the unit of the layer itself is the first.
        ahead: Number of layers to prefetch; 0 prefetches only the experts and router of the current layer.
    """
    for index, (unit, *parts) in enumerate(layers):
        later = [each for units in layers[index + 1 : index + 1 + ahead] for each in units]
        unit.set_modules_to_forward_prefetch([*parts, *later])
        earlier = [each for units in reversed(layers[max(0, index - ahead) : index]) for each in units]
        # With an empty list FSDP2 chooses what to prefetch. The list therefore names the unit itself, whose
        # weights are already gathered.
        unit.set_modules_to_backward_prefetch([unit, *earlier])
        for part in parts:
            part.set_modules_to_backward_prefetch([part])


def shards_within_experts(shape: torch.Size, ranks: int) -> bool:
    """Whether FSDP2 shards stacked expert weights inside each expert, without expert parallelism.

    The weights are sharded inside each expert if the ranks do not divide the number of experts. Sharding
    by expert would then gather padding: with 64 experts on 256 ranks, the padding of 192 experts. FSDP2
    requires that the ranks divide the second dimension.

    Args:
        shape: Shape of the unsharded parameter; only [E, ...] with three dimensions is expert weights.
        ranks: Number of ranks that share one copy.
    """
    return len(shape) == 3 and shape[0] % ranks != 0 and shape[1] % ranks == 0


def _data_mesh(mesh: DeviceMesh, shard: str) -> DeviceMesh:
    """Mesh over which gradients are summed; two-dimensional only if there is more than one copy."""
    return mesh["replicate", shard] if mesh["replicate"].size() > 1 else mesh[shard]


def _gathered(mesh: DeviceMesh, shard: str) -> bool:
    """Whether parameters come from other ranks; only then does resharding after forward save memory."""
    return mesh[shard].size() > 1
