"""The DeepSpeed JSON of a run: what its options say, and a user's own file merged in."""

import json
from pathlib import Path
from typing import Any

from olmoe_train.config.choices import Offload, Precision
from olmoe_train.config.train import TrainConfig
from olmoe_train.utils.errors import UserError

# DeepSpeed's defaults reserve 2 GB a rank for each of them, in elements; these fill a fast network as well.
BUCKET = 50_000_000


def deepspeed_config(cfg: TrainConfig, world_size: int, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration as it is used, and written to run_dir/deepspeed.json.

    UserError where parallel.deepspeed_config is not JSON, or sets something that a key of ours decides.
    """
    ours = _decided(cfg, world_size, cuda)
    merged = _merge(_defaults(), ours)
    path = cfg.parallel.deepspeed_config
    if path is None:
        return merged
    theirs = _read(path)
    if conflicts := _conflicts(ours, theirs):
        raise UserError("\n  - ".join([f"parallel.deepspeed_config={path}: remove from it", *conflicts]))
    return _merge(merged, theirs, keep="auto")


def _decided(cfg: TrainConfig, world_size: int, cuda: bool) -> dict[str, Any]:
    trainer, parallel = cfg.trainer, cfg.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.offload is not Offload.none:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if parallel.offload is Offload.parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_batch_size": trainer.global_batch_size,
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "gradient_accumulation_steps": trainer.global_batch_size // (trainer.micro_batch_size * world_size),
        "managed_gradient_accumulation": False,  # the training loop says when a step is complete
        # Stage 0 averages the ranks' norms, which is no norm with expert parallelism: clipped by ours there.
        "gradient_clipping": cfg.optimizer.max_grad_norm if parallel.zero_stage else 0.0,
        "bf16": {"enabled": trainer.precision is Precision.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # of gradients, as under FSDP2
        "zero_optimization": zero,
        # torch's fused AdamW, on the CPU too, so that every strategy takes the same step.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _defaults() -> dict[str, Any]:
    return {
        "steps_per_print": 10**9,  # the run has its own log
        "zero_optimization": {
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
        },
    }


# Sections that say again what our keys say, or that put in another model, optimizer or schedule.
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
    """Keys of `theirs` that do not agree with what our options decided, each with the option to set."""
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
    """`over` upon `base`, section by section; values equal to `keep` leave what `base` has."""
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
