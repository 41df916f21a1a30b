"""Memory of one rank with DeepSpeed ZeRO, in bytes on its GPU and in CPU memory (compare memory.py).

What a ZeRO stage shards is divided over all ranks. Expert-parallel experts are divided over the ranks that
have the same experts. tests/distributed/test_zero_memory.py compares the results with the tensors of real
engines.
"""

from dataclasses import replace

from olmoe_train.config.choices import Offload, Strategy
from olmoe_train.distributed.deepspeed_config import BUCKET
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.adapter import AdapterPlan
from olmoe_train.planning.layout import FP32, ParallelLayout, Units, count_units
from olmoe_train.planning.memory import (
    MicroBatch,
    RankMemory,
    all_to_all_bytes,
    recomputed_activations,
    saved_activations,
    temporary_bytes,
)


def deepspeed_memory(
    config: OlmoeConfig, layout: ParallelLayout, batch: MicroBatch, adapter: AdapterPlan | None = None
) -> RankMemory:
    """The memory of one rank's GPU, without what parallel.offload moves to the CPU.

    Parameters are those of the computation and, from ZeRO-1 on, the rank's part of the fp32 master weights.
    ZeRO-0 and 1 sum whole gradients in fp32; ZeRO-2 and 3 sum the rank's part. ZeRO-3 gathers a layer when it
    is needed, and prefetches the next one. Gradients are reduced in a bucket of fp32. Frozen weights have no
    master weights.

    Args:
        config: Architecture of the model.
        layout: How the ranks share the model.
        batch: What one rank computes at a time.
        adapter: The adapter; None: every parameter is trained.

    Returns:
        Bytes of each part.
    """
    batch = replace(batch, exchanged=layout.expert_parallel_size > 1)
    stage, offload = layout.zero_stage, layout.offload
    units = _unsharded_units(config, layout, adapter)
    layer = units.dense.sharded + units.experts.sharded
    weights = batch.element * (partitioned_elements(units, layout) if stage == 3 else units.sharded)
    whole, part = units.trained, partitioned_elements(units, layout, trained=True)
    masters = FP32 * part if stage > 0 else 0
    moments = 2 * FP32 * (part if stage > 0 else whole)
    gradients = FP32 * (part if stage > 1 else whole)
    if stage == 1 and batch.element < FP32:
        gradients += batch.element * whole  # the gradients of the last backward are kept beside their sum
    if offload is not Offload.none:
        masters = moments = 0
        largest = _largest_parameter(units)
        gradients = {1: batch.element * (whole + largest), 2: batch.element * largest, 3: 0}[stage]
    if offload is Offload.parameters:
        weights = 0
    exchange = all_to_all_bytes(config, batch)
    trained_layer = units.dense.trained + units.experts.trained
    reduction = (FP32 * BUCKET if stage > 0 else 0) + (batch.element * trained_layer if stage > 1 else 0)
    return RankMemory(
        parameters=weights + masters,
        gradients=gradients,
        optimizer=moments,
        gathered=batch.element * (2 * layer + units.head.sharded) if stage == 3 else 0,
        reduction=reduction,
        activations=saved_activations(config, batch, adapter) + recomputed_activations(config, batch),
        temporaries=temporary_bytes(config, batch, reduction + exchange, adapter),
        all_to_all=exchange,
        quantized=units.quantized,
    )


def host_memory(
    config: OlmoeConfig, layout: ParallelLayout, batch: MicroBatch, adapter: AdapterPlan | None = None
) -> int:
    """Bytes of CPU memory that parallel.offload takes per rank; 0 without offloading.

    These are the fp32 weights, two moments, gradients and their sum over micro-batches; with
    offload=parameters also the weights of the computation. ZeRO-1 and 2 also need buffers for the weights
    that go back to the GPU, and for the largest gradient that comes from it.
    """
    if layout.offload is Offload.none:
        return 0
    units = _unsharded_units(config, layout, adapter)
    part = partitioned_elements(units, layout, trained=True)
    host = 5 * FP32 * part
    if layout.zero_stage < 3:
        return host + batch.element * (part + _largest_parameter(units))
    weights = partitioned_elements(units, layout)
    return host + (batch.element * weights if layout.offload is Offload.parameters else 0)


def save_memory(config: OlmoeConfig, layout: ParallelLayout, adapter: AdapterPlan | None = None) -> int:
    """Bytes of CPU memory per rank of the copy that a checkpoint is written from, while it is written.

    The copy has the trained weights in fp32 and two moments, sharded as by FSDP2
    (training/engine/deepspeed.py).
    """
    sharded = ParallelLayout(Strategy.fsdp, layout.gpus, layout.expert_parallel_size)
    return 3 * FP32 * count_units(config, sharded, adapter).trained


def _largest_parameter(units: Units) -> int:
    """Elements of the largest trained parameter: the head, or gate_up_proj, which is 2/3 of a layer's experts
    (an upper bound for an adapter, whose parameters are small)."""
    return max(units.head.trained, units.experts.trained * 2 // 3)


def partitioned_elements(units: Units, layout: ParallelLayout, trained: bool = False) -> int:
    """Number of elements of one rank's part of a tensor kind that ZeRO shards, over all parameters.

    Args:
        units: What a rank holds that shards nothing but experts.
        layout: How the ranks share the model.
        trained: Whether to count trained parameters only.
    """
    if trained:
        dense = units.root.trained + units.layers * units.dense.trained
        experts = units.layers * units.experts.trained
    else:
        dense = units.root.sharded + units.layers * units.dense.sharded
        experts = units.layers * units.experts.sharded
    return -(-dense // layout.gpus) - (-experts // (layout.gpus // layout.expert_parallel_size))


def _unsharded_units(config: OlmoeConfig, layout: ParallelLayout, adapter: AdapterPlan | None) -> Units:
    """The whole model, with the experts of one EP rank only: what a rank holds that shards nothing else."""
    alone = ParallelLayout(Strategy.ddp, layout.gpus, layout.expert_parallel_size)
    return count_units(config, alone, adapter)
