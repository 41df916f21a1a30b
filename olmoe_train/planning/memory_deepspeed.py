"""memory.py's arithmetic for DeepSpeed ZeRO: the bytes of one rank on its GPU, and in CPU memory.

What a stage shards is cut over all ranks; parallel experts over the ranks that hold the same ones.
tests/distributed/test_zero_memory.py counts the tensors of real engines.
"""

from dataclasses import replace

from olmoe_train.config.choices import Offload, Strategy
from olmoe_train.distributed.deepspeed_config import BUCKET
from olmoe_train.model import OlmoeConfig
from olmoe_train.planning.memory import (
    FP32,
    Layout,
    MicroBatch,
    RankMemory,
    Units,
    all_to_all_bytes,
    count_units,
    recomputed_activations,
    saved_activations,
    temporary_bytes,
)


def zero_memory(config: OlmoeConfig, layout: Layout, batch: MicroBatch) -> RankMemory:
    """Bytes on the rank's GPU, without what parallel.offload moves to the CPU.

    Parameters are those of the computation and, from ZeRO-1 on, the rank's part of the fp32 masters. ZeRO-0
    and 1 sum whole gradients in fp32, ZeRO-2 and 3 the rank's part. ZeRO-3 gathers a layer as it comes, and
    fetches the next one meanwhile. Gradients travel in a bucket of fp32.
    """
    batch = replace(batch, exchanged=layout.expert_parallel_size > 1)
    stage, offload = layout.zero_stage, layout.offload
    units = _whole(config, layout)
    whole, part = units.sharded, partition(config, layout)
    layer = units.dense.sharded + units.experts.sharded
    weights = batch.element * (part if stage == 3 else whole)
    masters = FP32 * part if stage > 0 else 0
    moments = 2 * FP32 * (part if stage > 0 else whole)
    gradients = FP32 * (part if stage > 1 else whole)
    if stage == 1 and batch.element < FP32:
        gradients += batch.element * whole  # those of the last backward stay beside their sum
    if offload is not Offload.none:
        masters = moments = 0
        gradients = {1: batch.element * (whole + _largest(units)), 2: batch.element * _largest(units), 3: 0}[
            stage
        ]
    if offload is Offload.parameters:
        weights = 0
    exchange = all_to_all_bytes(config, batch)
    reduction = (FP32 * BUCKET if stage > 0 else 0) + (batch.element * layer if stage > 1 else 0)
    return RankMemory(
        parameters=weights + masters,
        gradients=gradients,
        optimizer=moments,
        gathered=batch.element * (2 * layer + units.head.sharded) if stage == 3 else 0,
        reduction=reduction,
        activations=saved_activations(config, batch) + recomputed_activations(config, batch),
        temporaries=temporary_bytes(config, batch, reduction + exchange),
        all_to_all=exchange,
    )


def host_memory(config: OlmoeConfig, layout: Layout, batch: MicroBatch) -> int:
    """Bytes in CPU memory that parallel.offload takes for one rank: fp32 weights, two moments, gradients and
    their sum over micro-batches; `parameters` has what the computation has, too. ZeRO-1 and 2 need room for
    what goes back to the GPU, and for the largest gradient on its way."""
    if layout.offload is Offload.none:
        return 0
    part = partition(config, layout)
    host = 5 * FP32 * part
    if layout.zero_stage < 3:
        return host + batch.element * (part + _largest(_whole(config, layout)))
    return host + (batch.element * part if layout.offload is Offload.parameters else 0)


def saved_memory(config: OlmoeConfig, layout: Layout) -> int:
    """Bytes in CPU memory of the copy that a checkpoint is written from (ZeroEngine.stored), on one rank,
    while it is written: fp32 weights and two moments, sharded as by FSDP2."""
    sharded = Layout(Strategy.fsdp, layout.gpus, layout.expert_parallel_size)
    return 3 * FP32 * count_units(config, sharded).sharded


def _largest(units: Units) -> int:
    """Elements of the largest parameter: the head, or gate_up_proj, two thirds of a layer's experts."""
    return max(units.head.sharded, units.experts.sharded * 2 // 3)


def partition(config: OlmoeConfig, layout: Layout) -> int:
    """Elements that one rank has of what is sharded."""
    units = _whole(config, layout)
    dense = units.root.sharded + units.layers * units.dense.sharded
    experts = units.layers * units.experts.sharded
    return -(-dense // layout.gpus) - (-experts // (layout.gpus // layout.expert_parallel_size))


def _whole(config: OlmoeConfig, layout: Layout) -> Units:
    """The model as a rank that shards nothing has it, with its own experts only."""
    return count_units(config, Layout(Strategy.ddp, layout.gpus, layout.expert_parallel_size))
