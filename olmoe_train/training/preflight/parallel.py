"""Checks of the parallel layout: ranks, model replicas, expert parallelism, and the limits of DeepSpeed."""

import math

import torch.distributed as dist

from olmoe_train.config.choices import (
    ActivationCheckpointing,
    Offload,
    Precision,
    Strategy,
)
from olmoe_train.config.optimizer import AdamWConfig, OrthogonalizingConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.deepspeed_config import deepspeed_config
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.utils.errors import UserError

FLAT = "the optimizer sees a flat part of all parameters in a row, which begins and ends inside matrices"
MUON_WITH_ZERO = {
    0: "DeepSpeed's engine makes the update, and here it is written for fused AdamW alone",
    1: FLAT,
    2: FLAT,
    3: "the optimizer sees a flat part of each parameter, and not its matrices",
}
"""ZeRO stage -> why a matrix cannot be orthogonalized there."""


def parallel_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is wrong with the parallel layout on `world_size` ranks, one message per error."""
    parallel, errors = cfg.parallel, []
    if parallel.strategy is not Strategy.fsdp and parallel.replicate_size != 1:
        errors.append(
            f"parallel.replicate_size={parallel.replicate_size}: has no meaning with parallel.strategy="
            f"{parallel.strategy.value}; set parallel.strategy=fsdp for HSDP, or parallel.replicate_size=1"
        )
    elif parallel.replicate_size > 0 and world_size % parallel.replicate_size:
        errors.append(
            f"parallel.replicate_size={parallel.replicate_size}: must divide the {world_size} ranks"
        )
    errors += _expert_parallel_errors(cfg, world_size)
    if parallel.strategy is Strategy.deepspeed:
        errors += _deepspeed_errors(cfg, world_size)
    return errors


def _expert_parallel_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    parallel, experts = cfg.parallel, cfg.model.num_experts
    size = parallel.expert_parallel_size
    if size <= 1 or parallel.replicate_size < 1:
        return []  # off, or reported as not positive
    if experts == 1:
        return [
            (
                f"parallel.expert_parallel_size={size}: a dense model (model.num_experts=1) has no experts "
                "to distribute; set parallel.expert_parallel_size=1"
            )
        ]
    errors = []
    if experts % size:
        errors.append(
            f"parallel.expert_parallel_size={size}: must divide model.num_experts={experts}, "
            "because each rank of a group holds the same number of experts"
        )
    # The ranks that together hold one copy of the experts.
    group = world_size // parallel.replicate_size if parallel.strategy is Strategy.fsdp else world_size
    if group % size:
        errors.append(
            f"parallel.expert_parallel_size={size}: must divide the number of ranks that share a copy of the "
            f"model, which is {group}; try {math.gcd(size, group)}"
        )
    elif parallel.strategy is Strategy.fsdp:
        # FSDP2 shards these experts on the second dimension of their weights, which must divide evenly.
        shards = group // size
        for name, width in (
            ("model.hidden_size", cfg.model.hidden_size),
            ("2 x model.intermediate_size", 2 * cfg.model.intermediate_size),
        ):
            if width % shards:
                errors.append(
                    f"parallel.expert_parallel_size={size}: {name}={width} must be a multiple of the "
                    f"{shards} ranks that hold the same experts; raise expert_parallel_size or replicate_size"
                )
    return errors


def _deepspeed_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What DeepSpeed 0.19 cannot do. Each message names the nearest setting that works."""
    parallel, trainer, errors = cfg.parallel, cfg.trainer, []
    stage = f"parallel.zero_stage={parallel.zero_stage}"
    if not 0 <= parallel.zero_stage <= 3:
        return [f"{stage}: must be 0, 1, 2 or 3"]
    if parallel.zero_stage == 0 and trainer.precision is Precision.bf16:
        errors.append(
            f"{stage} with trainer.precision=bf16: DeepSpeed accumulates gradients in fp32 only from "
            "ZeRO-1 on; set parallel.zero_stage=1, or parallel.strategy=ddp"
        )
    errors += _deepspeed_optimizer_errors(cfg)
    if trainer.spike_sigmas is not None:
        errors.append(
            f"trainer.spike_sigmas={trainer.spike_sigmas}: DeepSpeed reports the gradient norm only after "
            "the weights have changed; set trainer.spike_sigmas=null, or parallel.strategy=fsdp"
        )
    if parallel.offload is Offload.optimizer and parallel.zero_stage == 0:
        errors.append(
            f"{stage} with parallel.offload=optimizer: ZeRO-0 shards nothing to offload; set zero_stage=2"
        )
    if parallel.offload is Offload.parameters and parallel.zero_stage != 3:
        errors.append(
            f"{stage} with parallel.offload=parameters: only ZeRO-3 offloads those; set zero_stage=3"
        )
    sums_in_bf16 = parallel.zero_stage in (1, 2) and trainer.precision is Precision.bf16
    if sums_in_bf16 and parallel.offload is Offload.optimizer and _micro_batches(cfg, world_size) > 1:
        errors.append(
            f"{stage} with parallel.offload=optimizer and trainer.precision=bf16: DeepSpeed then sums the "
            "gradients of several micro-batches in bf16; set zero_stage=3, which sums in fp32, or raise "
            "trainer.micro_batch_size until a step has only one micro-batch"
        )
    if parallel.zero_stage == 3 and trainer.compile:
        errors.append(
            f"{stage} with trainer.compile=true: the hooks with which ZeRO-3 gathers weights are inside the "
            "compiled code, which torch recompiles for every layer until it gives up; set zero_stage=2, or "
            "parallel.strategy=fsdp"
        )
    if parallel.zero_stage == 3 and trainer.activation_checkpointing is ActivationCheckpointing.selective:
        errors.append(
            f"{stage} with trainer.activation_checkpointing=selective: the recomputation gathers weights "
            "at points where the first pass did not; set trainer.activation_checkpointing=full, or "
            "parallel.strategy=fsdp"
        )
    return errors


def _deepspeed_optimizer_errors(cfg: TrainConfig) -> list[str]:
    """What DeepSpeed cannot do with the optimizer, and with averages of the weights."""
    stage, decay, errors = cfg.parallel.zero_stage, cfg.trainer.ema_decay, []
    if isinstance(cfg.optimizer, OrthogonalizingConfig):
        errors.append(
            f"optimizer={cfg.optimizer.name} with parallel.zero_stage={stage}: {MUON_WITH_ZERO[stage]}; set "
            "optimizer=adamw, or parallel.strategy=fsdp"
        )
    elif not isinstance(cfg.optimizer, AdamWConfig):
        errors.append(
            f"optimizer={cfg.optimizer.name}: with parallel.strategy=deepspeed the optimizer is AdamW; set "
            "optimizer=adamw, or parallel.strategy=fsdp"
        )
    elif cfg.optimizer.moments_dtype is Precision.bf16:
        errors.append(
            "optimizer.moments_dtype=bf16: with parallel.strategy=deepspeed the update is that of fused "
            "AdamW, whose moments are fp32; set optimizer.moments_dtype=fp32, or parallel.strategy=fsdp"
        )
    if decay is not None:
        errors.append(
            f"trainer.ema_decay={decay}: with parallel.strategy=deepspeed the fp32 weights are "
            "in DeepSpeed's partitions, beside which no average is kept; set trainer.ema_decay=null, or "
            "parallel.strategy=fsdp"
        )
    if cfg.optimizer.no_decay:
        roles = ",".join(role.value for role in cfg.optimizer.no_decay)
        errors.append(
            f"optimizer.no_decay=[{roles}]: with parallel.strategy=deepspeed the parameters are grouped by "
            "the ranks that hold copies, not by role; set optimizer.no_decay=[], or parallel.strategy=fsdp"
        )
    return errors


def _micro_batches(cfg: TrainConfig, world_size: int) -> int:
    """Most micro-batches per rank and step; 0 if the batch sizes are invalid, which is reported elsewhere."""
    sequences_per_pass = cfg.trainer.micro_batch_size * world_size
    return cfg.trainer.largest_batch_size // sequences_per_pass if sequences_per_pass > 0 else 0


def deepspeed_file_errors(cfg: TrainConfig, world_size: int) -> list[str]:
    """What is wrong with the user's DeepSpeed JSON. DeepSpeed itself parses it if a process group exists."""
    path = cfg.parallel.deepspeed_config
    if cfg.parallel.strategy is not Strategy.deepspeed or path is None:
        return []
    try:
        config = deepspeed_config(
            cfg.trainer, cfg.parallel, cfg.optimizer.max_grad_norm, world_size, cuda=False
        )
        if dist.is_initialized():
            from olmoe_train.training.engine.deepspeed_model import (  # takes seconds
                import_deepspeed,
                parse_config,
            )

            import_deepspeed(resolve_device(cfg.trainer.device))
            parse_config(config, path)
    except UserError as error:
        return [str(error)]
    return []
