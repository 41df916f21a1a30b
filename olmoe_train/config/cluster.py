"""The options of `olmoe plan` about the cluster: the cost of a layout, and failures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CostConfig:
    gpus_per_node: int = 8
    """GPUs of one node, which NVLink connects."""
    nvlink_gb_per_second: float | None = None
    """Bandwidth between one GPU and the others of its node, in one direction, in GB/s (10^9 bytes). null:
    that of the data sheet of `gpu`."""
    network_gb_per_second: float | None = None
    """Bandwidth between one GPU and other nodes, in one direction, in GB/s; 400 Gb/s are 50 GB/s. null: that
    of the system that `gpu` is sold in."""
    overlap: float = 1.0
    """Part of the time of weights and gradients on the links that computation can hide, 0 to 1. The
    all-to-all of expert parallelism is never hidden."""
    max_violation: float = 2.0
    """router/max_violation to expect. With expert parallelism, the rank of the busiest expert computes more
    rows than the others, which wait for it. The default is that of the released OLMoE-1B-7B over six domains
    (expert counts in github.com/allenai/OLMoE: 1.1 to 2.0 in three of its layers)."""


@dataclass(frozen=True)
class FailuresConfig:
    per_gpu_year: float = 0.173
    """Failures that stop the run, per GPU and year of 365.25 days. The default is that of Llama 3 405B: 419
    unexpected interruptions of 16,384 GPUs in 54 days (arXiv 2407.21783, section 3.3.4)."""
    restart_seconds: float = 300.0
    """Time from a failure to the first new step, without the reading of the checkpoint, in seconds: to notice
    it, to replace the node, to start and compile. The default is an assumption; measure yours."""
    save_seconds: float | None = None
    """Time that a synchronous save takes, in seconds. null: that of the bytes of a checkpoint at
    failures.disk_gb_per_second, once to write them and once to read them, because a new checkpoint is
    verified before an older one is deleted."""
    disk_gb_per_second: float = 10.0
    """Bandwidth of run_dir's file system for all ranks together, in GB/s (10^9 bytes). The default is an
    assumption; measure yours."""
    host_gb_per_second: float = 25.0
    """Bandwidth between one GPU and the memory of its host, in GB/s, for the copy that checkpoint.async_save
    makes. The default is 80% of PCIe 4.0 x16."""
    background_slowdown: float = 0.1
    """Part of the time of a save in the background that training loses to it: cores and memory of the host,
    network. The default is an assumption; measure yours."""
