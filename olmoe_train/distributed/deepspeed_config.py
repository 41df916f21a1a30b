"""The DeepSpeed configuration of a run: the values set by the run's options, merged with the user's file."""

import json
from pathlib import Path
from typing import Any

from olmoe_train.config.choices import Offload, Precision
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.utils.errors import UserError

# Elements per bucket. DeepSpeed's default of 5e8 reserves 2 GB per rank for each bucket; this size also
# saturates a fast network.
BUCKET = 50_000_000


def deepspeed_config(
    trainer: TrainerConfig, parallel: ParallelConfig, max_grad_norm: float, world_size: int, cuda: bool
) -> dict[str, Any]:
    """Build the configuration that DeepSpeed receives and that the run writes to run_dir/deepspeed.json.

    Args:
        trainer: Batch sizes and precision.
        parallel: ZeRO stage, offloading and the user's file.
        max_grad_norm: Norm to which gradients are clipped.
        world_size: Number of ranks.
        cuda: Whether the run computes on GPUs; offloaded tensors are then in pinned memory.

    Returns:
        DeepSpeed's configuration. Values of the user's file replace the defaults of this module.

    Raises:
        UserError: The file in parallel.deepspeed_config cannot be read, is not a JSON object, or sets a value
            that an option of olmoe-train decides.
    """
    ours = _decided(trainer, parallel, max_grad_norm, world_size, cuda)
    merged = _merge(_defaults(), ours)
    path = parallel.deepspeed_config
    if path is None:
        return merged
    theirs = _read(path)
    if conflicts := _conflicts(ours, theirs):
        raise UserError("\n  - ".join([f"parallel.deepspeed_config={path}: remove from it", *conflicts]))
    return _merge(merged, theirs, keep="auto")


def _decided(
    trainer: TrainerConfig, parallel: ParallelConfig, max_grad_norm: float, world_size: int, cuda: bool
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.offload is not Offload.none:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if parallel.offload is Offload.parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        # A step of the batch-size warm-up has fewer micro-batches; the training loop says where it ends.
        "train_batch_size": trainer.largest_batch_size,
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": trainer.largest_batch_size // (trainer.micro_batch_size * world_size),
        "managed_gradient_accumulation": False,  # the training loop marks the last micro-batch
        # Stage 0 averages the norms of the ranks. With expert parallelism that average is not the norm of
        # the gradient, so olmoe-train clips the gradients in stage 0.
        "gradient_clipping": max_grad_norm if parallel.zero_stage else 0.0,
        "bf16": {"enabled": trainer.precision is Precision.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # for gradients, as with FSDP2
        "zero_optimization": zero,
        # Use torch's fused AdamW, also on the CPU, so that every strategy takes the same step.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _defaults() -> dict[str, Any]:
    return {
        "steps_per_print": 10**9,  # the run writes its own log
        "zero_optimization": {
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
    }


# Sections that olmoe-train's own options set, or that would replace the model, optimizer or schedule; each
# with the option to use instead.
_FOREIGN = {
    "optimizer": "optimizer.*",
    "scheduler": "scheduler.*",
    "fp16": "trainer.precision",
    "amp": "trainer.precision",
    "torch_autocast": "trainer.precision",
    "expert_parallel": "parallel.expert_parallel_size",
    "gradient_allreduce_op": "loss.*, whose gradients are summed over ranks",
    "tensor_parallel": "parallel.*",
    "sequence_parallel_size": "parallel.*",
    "activation_checkpointing": "trainer.activation_checkpointing",
    "compile": "trainer.compile",
    "wandb": "logging.wandb",
}
# Keys of DeepSpeed, each with the option of olmoe-train that sets the key.
_KEYS = {
    "train_batch_size": "trainer.global_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "gradient_accumulation_steps": "trainer.global_batch_size and trainer.micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16.enabled": "trainer.precision",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload",
    "zero_optimization.offload_param.device": "parallel.offload",
}


def _conflicts(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Messages about keys of `theirs` that contradict `ours`, each with the option to set instead."""
    found = []
    for name, value in theirs.items():
        key = f"{prefix}{name}"
        if key in _FOREIGN and not prefix:
            found.append(f"{key}: it is set by {_FOREIGN[key]}")
        elif isinstance(value, dict) and isinstance(ours.get(name, {}), dict):
            found += _conflicts(ours.get(name, {}), value, f"{key}.")
        elif value != "auto" and (name in ours or key in _KEYS) and ours.get(name) != value:
            setter = _KEYS.get(key)
            why = f"set {setter} instead" if setter else "olmoe-train needs its own value"
            found.append(f"{key}={json.dumps(value)}: {why} (it is {json.dumps(ours.get(name))} here)")
    return found


def _merge(base: dict[str, Any], over: dict[str, Any], keep: Any = None) -> dict[str, Any]:
    """Merge `over` into a copy of `base`, section by section.

    A value of `over` replaces the value of `base`, unless the value of `over` equals `keep`.
    """
    merged = dict(base)
    for name, value in over.items():
        if isinstance(value, dict):
            merged[name] = _merge(merged.get(name, {}), value, keep)
        elif keep is None or value != keep:
            merged[name] = value
    return merged


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"parallel.deepspeed_config={path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"parallel.deepspeed_config={path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"parallel.deepspeed_config={path}: must be a JSON object, as DeepSpeed documents it")
    return content
