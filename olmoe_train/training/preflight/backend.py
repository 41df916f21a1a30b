"""Checks of model.experts_backend: what the run asks of it, and what the machine has."""

import torch

from olmoe_train.config.choices import Device, ExpertsBackend, Precision
from olmoe_train.config.train import TrainConfig
from olmoe_train.model.moe.sonicmoe import why_not_here


def backend_errors(cfg: TrainConfig) -> list[str]:
    """What the backend does not compute; a message an error."""
    return _grouped_mm_errors(cfg) + _sonicmoe_errors(cfg)


def _grouped_mm_errors(cfg: TrainConfig) -> list[str]:
    if cfg.model.experts_backend is not ExpertsBackend.grouped_mm:
        return []
    multiple = 8 if cfg.trainer.precision is Precision.bf16 else 4  # elements in 16 bytes
    sizes = {
        "model.hidden_size": cfg.model.hidden_size,
        "model.intermediate_size": cfg.model.intermediate_size,
    }
    return [
        f"{key}={size}: model.experts_backend=grouped_mm takes multiples of {multiple} (rows of whole 16 "
        "bytes); change it, or use loop"
        for key, size in sizes.items()
        if size % multiple
    ]


def _sonicmoe_errors(cfg: TrainConfig) -> list[str]:
    """What the kernels of model.experts_backend=sonicmoe do not compute."""
    if cfg.model.experts_backend is not ExpertsBackend.sonicmoe:
        return []
    parallel = cfg.parallel.expert_parallel_size
    right = {
        f"model.hidden_act={cfg.model.hidden_act}": cfg.model.hidden_act in ("silu", "swish"),
        f"trainer.precision={cfg.trainer.precision.value}": cfg.trainer.precision is Precision.bf16,
        # A rank may then receive no row, and these kernels were not seen to take that.
        f"parallel.expert_parallel_size={parallel}": parallel <= 1,
    }
    supported = "silu, in bf16, without expert parallelism; use grouped_mm"
    return [
        f"model.experts_backend=sonicmoe with {option}: it is for {supported}"
        for option, possible in right.items()
        if not possible
    ]


def machine_errors(cfg: TrainConfig) -> list[str]:
    """What this machine lacks for it."""
    cuda = torch.cuda.is_available() and cfg.trainer.device is not Device.cpu
    wanted = cfg.model.experts_backend is ExpertsBackend.sonicmoe
    reason = why_not_here(cuda) if wanted else None
    return [f"model.experts_backend=sonicmoe: {reason}; or use grouped_mm"] if reason else []
