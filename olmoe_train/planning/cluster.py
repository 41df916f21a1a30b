"""Checks of the keys that only a plan has."""

from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.gpus import gpu_memory_gib


def cluster_errors(cfg: PlanConfig) -> list[str]:
    """What is wrong with these keys, one message per error."""
    cost, failures = cfg.cost, cfg.failures
    positive = {
        "gpus": cfg.gpus,
        "gpu_memory_gib": cfg.gpu_memory_gib,
        "mfu": cfg.mfu,
        "gpu_tflops": cfg.gpu_tflops,
        "cost.gpus_per_node": cost.gpus_per_node,
        "cost.nvlink_gb_per_second": cost.nvlink_gb_per_second,
        "cost.network_gb_per_second": cost.network_gb_per_second,
        "failures.per_gpu_year": failures.per_gpu_year,
        "failures.save_seconds": failures.save_seconds,
        "failures.disk_gb_per_second": failures.disk_gb_per_second,
        "failures.host_gb_per_second": failures.host_gb_per_second,
    }
    errors = [
        f"{key}={value}: must be positive"
        for key, value in positive.items()
        if value is not None and value <= 0
    ]
    if cfg.mfu > 1:
        errors.append(f"mfu={cfg.mfu}: is a fraction of the GPU's peak, at most 1; 40% is mfu=0.4")
    memory = gpu_memory_gib(cfg)
    if not 0 <= cfg.reserve_gib < memory:
        errors.append(f"reserve_gib={cfg.reserve_gib}: must be at least 0 and below gpu_memory_gib={memory}")
    if not 0 <= cost.overlap <= 1:
        errors.append(f"cost.overlap={cost.overlap}: is a fraction, at least 0 and at most 1")
    not_negative = {
        "cost.max_violation": cost.max_violation,
        "failures.restart_seconds": failures.restart_seconds,
        "failures.background_slowdown": failures.background_slowdown,
    }
    return errors + [
        f"{key}={value}: must not be negative" for key, value in not_negative.items() if value < 0
    ]
