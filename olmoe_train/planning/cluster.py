"""Checks of the keys of `olmoe plan` in the sections `cost` and `failures`."""

from olmoe_train.config.verbs import PlanConfig


def cluster_errors(cfg: PlanConfig) -> list[str]:
    """What is wrong with these keys, one message per error."""
    cost, failures = cfg.cost, cfg.failures
    positive = {
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
