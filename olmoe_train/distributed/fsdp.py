"""FSDP2: which parameters form a unit, how they are sharded, and what is prefetched."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from olmoe_train.config.choices import Precision, Strategy
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.transformer import OlmoeDecoderLayer


def shard(model: OlmoeForCausalLM, mesh: Mesh, cfg: TrainConfig) -> None:
    """FSDP2 over the mesh: one unit a decoder layer; embedding, final norm and head are the root's. Units of
    their own are parallel experts, over the ranks that hold the same ones, and in bf16 the routers.

    trainer.precision bf16: fp32 parameters are cast to bf16 as they are gathered, gradients are summed in
    fp32.
    """
    policy = MixedPrecisionPolicy()
    if cfg.trainer.precision is Precision.bf16:
        # The model says itself where it needs fp32; FSDP would cast layer inputs, whatever they are, to bf16.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    layers = []
    for layer in model.model.layers:
        assert isinstance(layer, OlmoeDecoderLayer)
        layers.append(_shard_layer(layer, mesh, policy, cfg.parallel.reshard_after_forward))
    _prefetch(layers, cfg.parallel.prefetch if cfg.parallel.strategy is Strategy.fsdp else 0)
    data = _data_mesh(mesh.dense, "shard")
    fully_shard(model, mesh=data, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "training_forward")
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            # A plain sum. With the factor alone FSDP asks for a pre-multiplied sum, which only NCCL has.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def _shard_layer(
    layer: OlmoeDecoderLayer, mesh: Mesh, policy: MixedPrecisionPolicy, reshard: bool
) -> list[FSDPModule]:
    """The layer's units, its own first."""
    data = _data_mesh(mesh.dense, "shard")
    units = []
    if policy.param_dtype is not None:
        # Routers stay fp32, weights and gradients, and a unit has one dtype. Small: kept until backward.
        units.append(fully_shard(layer.mlp.gate, mesh=data, reshard_after_forward=False))
    if mesh.expert is not None:
        experts = fully_shard(
            layer.mlp.experts,
            mesh=_data_mesh(mesh.expert, "expert_shard"),
            # Inside of each expert: their own dimension is spread over the expert ranks already.
            shard_placement_fn=lambda parameter: Shard(1),
            mp_policy=policy,
            reshard_after_forward=reshard and _gathered(mesh.expert, "expert_shard"),
        )
        units.append(experts)
    ranks = mesh.dense["shard"].size()
    unit = fully_shard(
        layer,
        mesh=data,
        shard_placement_fn=lambda parameter: Shard(1) if cut_inside(parameter.shape, ranks) else None,
        mp_policy=policy,
        reshard_after_forward=reshard and _gathered(mesh.dense, "shard"),
    )
    return [unit, *units]


def _prefetch(layers: list[list[FSDPModule]], ahead: int) -> None:
    """Ask for the weights of so many layers ahead of the one at work, in forward and in backward.

    layers: the units of each, its own first. In forward a layer asks for its other units' in any case: before
    attention, during which experts arrive. Later, dispatch would make the host wait first. In backward their
    turn comes first, and they must not be in the layer's list: it is gone through again as the gradient of
    the router's logits comes, and experts that are done would be gathered once more.
    """
    for index, (unit, *parts) in enumerate(layers):
        later = [each for units in layers[index + 1 : index + 1 + ahead] for each in units]
        unit.set_modules_to_forward_prefetch([*parts, *later])
        earlier = [each for units in reversed(layers[max(0, index - ahead) : index]) for each in units]
        # With an empty list FSDP2 goes by a guess of its own; the unit itself is here already.
        unit.set_modules_to_backward_prefetch([unit, *earlier])
        for part in parts:
            part.set_modules_to_backward_prefetch([part])


def cut_inside(shape: torch.Size, ranks: int) -> bool:
    """Whether FSDP2 cuts expert weights (E, ...) inside of each expert, without expert parallelism: where not
    every rank would get as many experts, and padding be gathered (for 64 on 256 ranks, that of 192).

    It cuts the second dimension evenly or not at all.
    """
    return len(shape) == 3 and shape[0] % ranks != 0 and shape[1] % ranks == 0


def _data_mesh(mesh: DeviceMesh, shard: str) -> DeviceMesh:
    """The mesh that gradients are summed over: two-dimensional only where there are copies to sum over."""
    return mesh["replicate", shard] if mesh["replicate"].size() > 1 else mesh[shard]


def _gathered(mesh: DeviceMesh, shard: str) -> bool:
    """Whether parameters come from other ranks; only then does freeing them after forward save memory."""
    return mesh[shard].size() > 1
