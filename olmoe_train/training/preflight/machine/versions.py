"""Versions that do not go together: requirements of packages, a table of known conflicts, and hosts that
differ."""

import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from olmoe_train.config.choices import Packing
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.training.preflight.machine.result import Result, Site, State

PACKAGE = "olmoe-train"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
SHOWN = ("python", "torch", "cuda", "nccl", "deepspeed", "numpy")
"""Versions that `olmoe doctor` prints, and that all hosts must have in common."""


@dataclass(frozen=True)
class Conflict:
    """Versions that do not go together. What pyproject.toml and the packages themselves require is not here:
    it is read from their metadata."""

    versions: dict[str, str]
    """Name, as in `version_of` -> specifier. The conflict is there if all of them match."""
    what: str
    fix: str
    source: str
    state: State = State.failed
    machine: str = ""
    """Kind of processor that has the conflict, as platform.machine() names it; empty: every kind."""
    concerns: Callable[[TrainConfig], bool] = lambda cfg: True
    """Whether a run with this configuration meets the conflict."""


def _has_half_tiles(cfg: TrainConfig) -> bool:
    return cfg.data.packing is Packing.none or cfg.data.sequence_length % 128 == 64


CONFLICTS = (
    Conflict(
        {"cuda": ">=13,<14", "unusable driver": "<580"},
        "CUDA 13 needs a driver of version 580 or newer",
        "update the NVIDIA driver, or install a torch that is built for CUDA 12",
        "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html",
    ),
    Conflict(
        {"cuda": ">=12,<13", "unusable driver": "<525"},
        "CUDA 12 needs a driver of version 525 or newer",
        "update the NVIDIA driver",
        "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html",
    ),
    Conflict(
        {"nccl": "==2.29.2"},
        "NCCL 2.29.2 can hang on ARM",
        "install NCCL 2.29.3 or newer",
        "https://github.com/NVIDIA/nccl/releases/tag/v2.29.3-1",
        State.warning,
        machine="aarch64",
    ),
    Conflict(
        {"nccl": "<2.26.2"},
        "NCCL before 2.26.2 can hang when it aborts, so that a rank that lost another one does not end",
        "take the NCCL that torch was installed with: unset LD_PRELOAD and LD_LIBRARY_PATH of another one",
        "https://github.com/pytorch/pytorch/pull/149546",
        State.warning,
    ),
    Conflict(
        {"torch": ">=2.11,<2.14", "compute capability": "==9.0"},
        "with this torch, cuDNN's attention can give NaN gradients on H100 and H200, if there is a mask and "
        "the length of a sequence is 64 above a multiple of 128",
        "set data.sequence_length to a multiple of 128, and data.packing to another value than none",
        "https://github.com/pytorch/pytorch/issues/196678",
        State.warning,
        concerns=_has_half_tiles,
    ),
    Conflict(
        {"wandb": "==0.26.0", "protobuf": "<6.32.1"},
        "wandb 0.26.0 cannot be imported with protobuf before 6.32.1",
        "update wandb",
        "https://github.com/wandb/wandb/issues/11758",
    ),
    Conflict(
        {"numpy": ">=2", "pyarrow": "<16.1"},
        "pyarrow before 16.1 is built for NumPy 1",
        "update pyarrow",
        "https://github.com/apache/arrow/issues/39532",
    ),
)


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """Version of the NVIDIA driver of this host; None: there is none."""
    try:
        found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", file.read_text())
    except OSError:
        return None
    return found[1] if found else None


@cache
def version_of(name: str) -> str | None:
    """A version on this host; None: there is none.

    Args:
        name: A Python package, or one of these. python. cuda, nccl: what torch was built with, or has loaded.
            compute capability: of the first GPU. unusable driver: the NVIDIA driver, if torch cannot use a
            GPU; a driver that works is new enough, if need be by CUDA's forward-compatibility package.
    """
    if name == "python":
        return platform.python_version()
    if name == "cuda":
        return torch.version.cuda
    if name == "nccl":
        has_nccl = torch.version.cuda is not None and dist.is_nccl_available()
        return ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None
    if name == "compute capability":
        return "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    if name == "unusable driver":
        return None if torch.cuda.is_available() else driver_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


VersionOf = Callable[[str], str | None]


def versions(site: Site) -> list[Result]:
    """Packages have the versions that this package requires, and none of the known conflicts."""
    return version_results(site.cfg, version_of)


def version_results(cfg: TrainConfig, version: VersionOf) -> list[Result]:
    """What is wrong with the versions that `version` gives by name; one result if nothing is."""
    results = required(PACKAGE, version, "versions", State.failed)
    for conflict in CONFLICTS:
        concerns = conflict.machine in ("", platform.machine()) and conflict.concerns(cfg)
        if concerns and _matches(conflict.versions, version):
            text = f"{conflict.what}, and this host has {_named(conflict.versions, version)}"
            results.append(Result("versions", conflict.state, text, f"{conflict.fix} ({conflict.source})"))
    return results or [Result("versions", State.ok, _named(SHOWN, version))]


def dependencies(site: Site) -> list[Result]:
    """What this package depends on has the versions that it requires in turn, as `pip check` would find."""
    names = [Requirement(text).name for text in _requirements(PACKAGE)]
    results = [one for name in names for one in required(name, version_of, "dependencies", State.warning)]
    return results or [Result("dependencies", State.ok, f"{len(names)} packages have what they require")]


def required(package: str, version: VersionOf, check: str, state: State) -> list[Result]:
    """A result for each requirement of a package that is not met, by the package's own metadata.

    Args:
        package: Name of the package; nothing is required of one that is not installed, as in a checkout.
        version: Gives the version of a package by name.
        check: Name of the check.
        state: Of a package with another version. A missing one is a warning: not every run uses it.
    """
    results = []
    for text in _requirements(package):
        requirement = Requirement(text)
        found = version(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            continue
        has = f"{requirement.name} {found}" if found else f"no {requirement.name}"
        wanted = f"{requirement.name}{requirement.specifier}"
        what = f"{package} requires {wanted}, and this host has {has}"
        how = state if found else State.warning
        results.append(Result(check, how, what, f'run: pip install "{wanted}"'))
    return results


def same_versions(site: Site) -> list[Result]:
    """All hosts have the same software. Collective."""
    if site.world_size == 1:
        return [Result("same_versions", State.skipped, "one rank")]
    here = _named(SHOWN, version_of)
    first = gather_from_all(lambda: here)[0]
    if here == first:
        return [Result("same_versions", State.ok, "the same software as rank 0")]
    what = f"other software than rank 0: {here}; rank 0 has {first}"
    fix = "start all ranks from the same environment, such as one container image or one shared file system"
    return [Result("same_versions", State.failed, what, fix)]


@cache
def _requirements(package: str) -> list[str]:
    """The requirements of a package that hold on this host, without those of its extras."""
    try:
        texts = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    markers = [(text, Requirement(text).marker) for text in texts]
    return [text for text, marker in markers if marker is None or marker.evaluate({"extra": ""})]


def _matches(wanted: dict[str, str], version: VersionOf) -> bool:
    found = {name: version(name) for name in wanted}
    return all(
        found[name] is not None and SpecifierSet(specifier).contains(str(found[name]), prereleases=True)
        for name, specifier in wanted.items()
    )


def _named(names: Iterable[str], version: VersionOf) -> str:
    found = {name.removeprefix("unusable "): version(name) for name in names}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
