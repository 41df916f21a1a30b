"""GPUs: driver and build of torch, memory, and links between the GPUs of a host.

No test runs these on a GPU: `parse_links` is tested on text, and the rest on hosts without one.
"""

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import fields
from itertools import combinations

import torch

from olmoe_train.config.choices import Device, Precision
from olmoe_train.config.train import TrainConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.report import plan_layout, plan_memory, plan_micro_batch
from olmoe_train.training.preflight.machine.result import GIB, Result, Site, State, in_units
from olmoe_train.training.preflight.machine.versions import driver_version, version_of

OTHERS_BYTES = 4 * GIB
"""Memory in use beyond which other processes are on the GPU. The context of CUDA and NCCL's buffers take 1 to
2 GiB."""
NVIDIA_SMI_S = 10.0


def plan_of(site: Site) -> PlanConfig:
    """The configuration as `olmoe plan` takes it, with a GPU per rank."""
    values = {item.name: getattr(site.cfg, item.name) for item in fields(TrainConfig)}
    return PlanConfig(**values, gpus=site.world_size)


def cuda(site: Site) -> list[Result]:
    """torch can use the GPUs of this host: driver, build, architecture, and one GPU per rank."""
    if site.cfg.trainer.device is Device.cpu:
        return [Result("cuda", State.skipped, "trainer.device=cpu")]
    built, driver = torch.version.cuda, driver_version()
    if torch.cuda.is_available():
        return _gpus(site)
    if driver is None:
        return [Result("cuda", State.skipped, "this host has no NVIDIA driver; the run uses the CPU")]
    if built is None:
        what = f"torch {torch.__version__} is built without CUDA, and this host has NVIDIA driver {driver}"
        fix = "install a torch that is built for CUDA, or set trainer.device=cpu"
        return [Result("cuda", State.failed, what, fix)]
    what = f"torch finds no GPU, with NVIDIA driver {driver} and torch built for CUDA {built}"
    fix = (
        "look at nvidia-smi and at CUDA_VISIBLE_DEVICES; a container needs docker run --gpus all; "
        "trainer.device=cpu does without"
    )
    return [Result("cuda", State.failed, what, fix)]


def _gpus(site: Site) -> list[Result]:
    count = torch.cuda.device_count()
    if count < site.local_ranks:
        what = f"{site.local_ranks} ranks on this host, and {count} GPUs"
        return [Result("cuda", State.failed, what, "start one rank per GPU (--nproc auto)")]
    results, capability = [], torch.cuda.get_device_capability()
    if not is_built_for(capability, torch.cuda.get_arch_list()):
        what = f"torch {torch.__version__} has no code for this GPU, sm_{capability[0]}{capability[1]}"
        fix = "install a torch whose build has it (github.com/pytorch/pytorch/blob/main/RELEASE.md)"
        results.append(Result("cuda", State.failed, what, fix))
    if site.cfg.trainer.precision is Precision.bf16 and capability < (8, 0):
        what = "trainer.precision=bf16: GPUs before Ampere have no bf16 units, and are slow"
        results.append(Result("cuda", State.warning, what, "set trainer.precision=fp32"))
    names = ", ".join(
        f"{number} x {name}"
        for name, number in Counter(torch.cuda.get_device_name(gpu) for gpu in range(count)).items()
    )
    what = f"{names}, driver {driver_version()}, CUDA {torch.version.cuda}, NCCL {version_of('nccl')}"
    return results or [Result("cuda", State.ok, what)]


def is_built_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a torch has code for a GPU: that of its own generation, or intermediate code to translate.

    Args:
        capability: Compute capability of the GPU.
        architectures: What torch was built for, such as sm_90 and compute_120.
    """
    for kind, digits in (name.split("_")[:2] for name in architectures if "_" in name):
        number = re.match(r"\d+", digits)
        if number is None:
            continue
        major, minor = divmod(int(number[0]), 10)
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def gpu_memory(site: Site) -> list[Result]:
    """The GPU of this rank is free, and has the memory that `olmoe plan` counts."""
    if site.device.type != "cuda":
        return [Result("gpu_memory", State.skipped, "the run uses no GPU")]
    free, total = torch.cuda.mem_get_info()
    if total - free > OTHERS_BYTES:
        what = f"GPU {site.local_rank}: {in_units(total - free)} of {in_units(total)} are in use"
        return [Result("gpu_memory", State.warning, what, "end what uses the GPU (nvidia-smi lists it)")]
    if site.errors:
        return [Result("gpu_memory", State.ok, f"{in_units(free)} of {in_units(total)} free")]
    plan = plan_of(site)
    need = plan_memory(plan, plan_layout(plan), plan_micro_batch(plan))[0].total
    values = {"free_bytes": free, "planned_bytes": need}
    if need > free:
        what = f"{in_units(free)} free, and `olmoe plan` counts {in_units(need)}"
        fix = "see `olmoe plan` for layouts, micro-batches and activation checkpointing that fit"
        return [Result("gpu_memory", State.warning, what, fix, values)]
    what = f"{in_units(free)} of {in_units(total)} free; `olmoe plan` counts {in_units(need)}"
    return [Result("gpu_memory", State.ok, what, values=values)]


def gpu_links(site: Site) -> list[Result]:
    """The GPUs of this host reach each other directly."""
    if site.device.type != "cuda" or site.local_ranks < 2:
        return [Result("gpu_links", State.skipped, "the run has no two GPUs on this host")]
    pairs = list(combinations(range(min(site.local_ranks, torch.cuda.device_count())), 2))
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    kinds = Counter(parse_links(topology()).values())
    described = ", ".join(f"{kind} {number}" for kind, number in sorted(kinds.items()))
    if apart:
        example = "GPUs {} and {}".format(*apart[0])
        what = f"{len(apart)} of {len(pairs)} pairs of GPUs do not reach each other, such as {example}"
        fix = (
            "traffic then takes the memory of the host; look at `nvidia-smi topo -p2p r`, at IOMMU and ACS, "
            "and at NCCL_P2P_DISABLE"
        )
        return [Result("gpu_links", State.warning, what, fix)]
    what = f"all {len(pairs)} pairs of GPUs reach each other"
    return [Result("gpu_links", State.ok, f"{what}; links by nvidia-smi: {described or 'unknown'}")]


def topology() -> str:
    """What `nvidia-smi topo -m` prints; empty: there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "topo", "-m"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_S).stdout
    except subprocess.TimeoutExpired:
        return ""


def parse_links(text: str) -> dict[tuple[int, int], str]:
    """The kind of link of each pair of GPUs in the matrix of `nvidia-smi topo -m`: NV18, PIX, SYS, ..."""
    plain = re.sub(r"\x1b\[\d*m", "", text)
    rows = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d+\s", line)]
    gpus = [row for row in rows if row[1:2] and not row[1].startswith("GPU")]
    return {
        (first, second): gpus[first][1 + second]
        for first, second in combinations(range(len(gpus)), 2)
        if 1 + second < len(gpus[first])
    }
