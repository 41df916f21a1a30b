"""The one place and order in which parallelism is put onto the model, from outside:
activation checkpointing -> torch.compile -> FSDP2.

Both strategies are FSDP2 (`fully_shard`): with ddp every rank is a shard group of its own, so parameters stay
whole and only gradients are reduced. Gradients are summed over all ranks, never averaged: the loss is already
divided by counts over the whole global batch, whatever each rank's share of them.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from olmoe_train.config import ActivationCheckpointing, Precision, TrainConfig
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.init import initial_value
from olmoe_train.model.transformer import OlmoeDecoderLayer

_aten = torch.ops.aten
# Recomputation has to send every token where the first pass sent it, and a kernel that sums in another order
# may break a near-tie the other way: so the choice itself is kept. T x K values and indices a layer.
_ROUTING = frozenset({_aten.topk.default})
# What `selective` keeps besides: results of matrix products and attention, most of a layer's arithmetic.
_MATRIX_PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten._grouped_mm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def parallelize(model: OlmoeForCausalLM, cfg: TrainConfig, mesh: Mesh) -> OlmoeForCausalLM:
    """Apply the configured parallelism to a model, in place; parameters become DTensors.

    A meta model is then filled by `initialise`. Call before the optimizer is built.
    """
    checkpoint_activations(model, cfg.trainer.activation_checkpointing)
    if cfg.trainer.compile:
        compile_layers(model)
    shard(model, mesh, cfg.trainer.precision)
    return model


def checkpoint_activations(model: OlmoeForCausalLM, mode: ActivationCheckpointing) -> None:
    """Recompute each decoder layer in backward, from its input and what the mode keeps."""
    if mode is ActivationCheckpointing.none:
        return
    kept = _ROUTING if mode is ActivationCheckpointing.full else _ROUTING | _MATRIX_PRODUCTS

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    for layer in model.model.layers:
        # The instance's forward, not a wrapper module: names stay as they are, and FSDP's hooks stay outside
        # of the recomputation.
        layer.forward = functools.partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
            preserve_rng_state=model.config.attention_dropout > 0,
        )


def compile_layers(model: OlmoeForCausalLM) -> None:
    """torch.compile the parts of each layer, in place; one compilation serves all layers.

    Not the layer as a whole: routing stays visible to activation checkpointing, and what depends on the host
    (the all-to-all's sizes) does not break a graph. Compiled parts are recomputed whole in backward.
    """
    for layer in model.model.layers:
        assert isinstance(layer, OlmoeDecoderLayer)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        for part in (*norms, layer.self_attn, layer.mlp.experts):
            part.forward = torch.compile(part.forward)  # type: ignore[method-assign, assignment]


def shard(model: OlmoeForCausalLM, mesh: Mesh, precision: Precision) -> None:
    """FSDP2 over the mesh: one unit a decoder layer; embedding, final norm and head are the root's.

    precision bf16: fp32 parameters are cast to bf16 as they are gathered, gradients are summed in fp32.
    """
    policy = MixedPrecisionPolicy()
    if precision is Precision.bf16:
        # The model says itself where it needs fp32; FSDP would cast layer inputs, whatever they are, to bf16.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    replicated = mesh.dense.size(0) > 1
    data = mesh.dense if replicated else mesh.dense["shard"]
    # Freeing a layer between forward and backward saves memory only where it is gathered from other ranks.
    reshard = mesh.dense["shard"].size() > 1
    for layer in model.model.layers:
        fully_shard(layer, mesh=data, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=data, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "training_forward")
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            # A plain sum. With the factor alone FSDP asks for a pre-multiplied sum, which only NCCL has.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def initialise(model: OlmoeForCausalLM, device: torch.device, seed: int) -> None:
    """Give a parallelized meta model memory, and the same initial weights in every layout, bit for bit.

    Each rank draws what its shards need: its own experts of the stacked expert weights, and the others whole,
    one at a time.
    """
    assert not any(True for _ in model.buffers()), "a buffer would be left uninitialised"
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        index = shard_slices(parameter)
        experts = range(*index[0].indices(parameter.shape[0])) if parameter.ndim == 3 else None
        value = initial_value(name, parameter.shape, seed, model.config.initializer_range, experts)
        rest = (slice(None), *index[1:]) if experts is not None else index
        local_tensor(parameter).copy_(value[rest])


def shard_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole tensor, a slice a dimension.

    DTensor's rule: chunks of ceil(size / ranks), the last ones shorter or empty.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        coordinates = tensor.device_mesh.get_coordinate()
        assert coordinates is not None
        for size, at, placement in zip(tensor.device_mesh.shape, coordinates, tensor.placements, strict=True):
            if isinstance(placement, Shard):
                start, stop = bounds[placement.dim]
                chunk = -(-(stop - start) // size)
                bounds[placement.dim] = (min(start + at * chunk, stop), min(start + (at + 1) * chunk, stop))
    return tuple(slice(start, stop) for start, stop in bounds)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
