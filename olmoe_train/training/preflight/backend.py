"""Checks of model.experts_backend: what the kernels support, and what this machine has."""

from olmoe_train.config.choices import ExpertsBackend, Precision
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.mesh import resolve_device
from olmoe_train.model.moe.sonicmoe import why_not_here
from olmoe_train.utils.errors import UserError


def backend_errors(cfg: TrainConfig) -> list[str]:
    """What the chosen backend cannot compute, one message per error."""
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
        f"{key}={size}: model.experts_backend=grouped_mm needs a multiple of {multiple}, because a row must "
        f"be a multiple of 16 bytes; change {key}, or set model.experts_backend=loop"
        for key, size in sizes.items()
        if size % multiple
    ]


def _sonicmoe_errors(cfg: TrainConfig) -> list[str]:
    """What the kernels of model.experts_backend=sonicmoe cannot compute."""
    if cfg.model.experts_backend is not ExpertsBackend.sonicmoe:
        return []
    parallel = cfg.parallel.expert_parallel_size
    supported = {
        f"model.hidden_act={cfg.model.hidden_act}": cfg.model.hidden_act in ("silu", "swish"),
        f"trainer.precision={cfg.trainer.precision.value}": cfg.trainer.precision is Precision.bf16,
        # With expert parallelism a rank may receive no row, which these kernels are not known to support.
        f"parallel.expert_parallel_size={parallel}": parallel <= 1,
    }
    return [
        f"model.experts_backend=sonicmoe with {option}: it supports only silu, in bf16, without expert "
        "parallelism; set model.experts_backend=grouped_mm"
        for option, is_supported in supported.items()
        if not is_supported
    ]


def machine_errors(cfg: TrainConfig) -> list[str]:
    """What this machine lacks for the run, one message per error."""
    try:
        device = resolve_device(cfg.trainer.device)
    except UserError as error:
        return [str(error)]
    if cfg.model.experts_backend is not ExpertsBackend.sonicmoe:
        return []
    reason = why_not_here(device.type == "cuda")
    fix = "or set model.experts_backend=grouped_mm"
    return [f"model.experts_backend=sonicmoe: {reason}; {fix}"] if reason else []
