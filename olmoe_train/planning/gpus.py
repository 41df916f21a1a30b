"""The GPUs of `olmoe plan`: memory, peak and bandwidths, by their data sheets."""

from dataclasses import dataclass

from olmoe_train.config.choices import Gpu
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.flops import peak_flops
from olmoe_train.planning.traffic import Links


@dataclass(frozen=True)
class GpuSpec:
    """One kind of GPU. Bandwidths are in bytes per second and one direction."""

    name: str
    """By which flops.py has its dense peak in bf16 and fp32."""
    memory_gib: float
    """Memory. Data sheets say GB; drivers report 0.98 to 1.0 times as many GiB, which reserve_gib covers."""
    memory_bandwidth: float
    nvlink: float
    """To the other GPUs of its node, half of what data sheets count for both directions."""
    network: float
    """To other nodes: its share of the network cards of the usual system."""


GPUS = {
    # NVIDIA A100 data sheet (80 GB SXM): 2,039 GB/s, NVLink 600 GB/s. DGX A100: one 200 Gb/s card per GPU.
    Gpu.a100: GpuSpec("A100", 80.0, 2.039e12, 300e9, 25e9),
    # NVIDIA H100 data sheet (SXM): 3.35 TB/s, NVLink 900 GB/s. DGX H100: one 400 Gb/s ConnectX-7 per GPU.
    Gpu.h100: GpuSpec("H100", 80.0, 3.35e12, 450e9, 50e9),
    # NVIDIA H200 data sheet (SXM): 141 GB, 4.8 TB/s, NVLink 900 GB/s. DGX H200: as DGX H100.
    Gpu.h200: GpuSpec("H200", 141.0, 4.8e12, 450e9, 50e9),
    # NVIDIA DGX B200 data sheet: 1,440 GB, 64 TB/s and NVLink 14.4 TB/s for 8 GPUs; 400 Gb/s per GPU.
    Gpu.b200: GpuSpec("B200", 180.0, 8e12, 900e9, 50e9),
    # AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s, seven links of 128 GB/s (Infinity Fabric, no NVLink).
    # Azure virtual machines with MI300X: 400 Gb/s per GPU.
    Gpu.mi300x: GpuSpec("MI300X", 192.0, 5.3e12, 448e9, 50e9),
}


def gpu_memory_gib(cfg: PlanConfig) -> float:
    """Memory of one GPU in GiB: gpu_memory_gib, or that of `gpu`."""
    return GPUS[cfg.gpu].memory_gib if cfg.gpu_memory_gib is None else cfg.gpu_memory_gib


def gpu_peak_flops(cfg: PlanConfig) -> float:
    """Peak FLOP/s of one GPU: gpu_tflops, or that of `gpu` in trainer.precision."""
    if cfg.gpu_tflops is not None:
        return cfg.gpu_tflops * 1e12
    peak = peak_flops(GPUS[cfg.gpu].name, cfg.trainer.precision.dtype)
    assert peak is not None, "flops.py has every GPU of the table"
    return peak


def gpu_links(cfg: PlanConfig) -> Links:
    """Bandwidths between GPUs: those of `cost`, or those of `gpu`."""
    spec, cost = GPUS[cfg.gpu], cfg.cost
    nvlink = spec.nvlink if cost.nvlink_gb_per_second is None else cost.nvlink_gb_per_second * 1e9
    network = spec.network if cost.network_gb_per_second is None else cost.network_gb_per_second * 1e9
    return Links(cost.gpus_per_node, nvlink, network)
