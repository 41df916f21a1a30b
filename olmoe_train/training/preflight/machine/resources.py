"""What a host gives a run: open files, locked memory, shared memory, and the disk of run_dir."""

import os
import resource
import tempfile
from pathlib import Path

from olmoe_train.checkpoint.directory import complete_checkpoints, step_of
from olmoe_train.config.model import olmoe_config
from olmoe_train.planning.adapter import adapter_plan
from olmoe_train.planning.checkpoint_size import DiskPlan, disk_plan
from olmoe_train.training.preflight.machine.result import GIB, Result, Site, State, in_units
from olmoe_train.training.preflight.schedule import known_last_step

SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
NCCL_SHARED_MEMORY = GIB
"""What NVIDIA recommends for NCCL in a container: docker run --shm-size=1g (NCCL user guide, Troubleshooting,
Sharing Data)."""
BATCHES_PER_WORKER = 2
"""Micro-batches that a loader worker has ready: DataLoader's own prefetch_factor."""
TOKEN_BYTES = 4 * 8
"""Of a micro-batch in shared memory: at most four columns of int64."""


def open_files(site: Site) -> list[Result]:
    """The limit of open files suffices for the connections to all other ranks.

    A gloo group of n ranks has n + 3 files open on each of them (torch 2.13). All ranks are in the first
    group and in that of checkpoint.async_save; the groups of the layout are smaller. NCCL adds its own.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    least, enough = 64 + 2 * site.world_size, 256 + 8 * site.world_size
    if limit == resource.RLIM_INFINITY or limit >= enough:
        return [Result("open_files", State.ok, f"at most {limit:,} open files per process")]
    what = f"at most {limit:,} open files per process; {site.world_size:,} ranks need"
    fix = f"run `ulimit -n {max(enough, 4096)}` before the launcher, or raise nofile in limits.conf"
    if limit < least:
        return [Result("open_files", State.failed, f"{what} {least:,} or more", fix)]
    return [Result("open_files", State.warning, f"{what} up to {enough:,}", fix)]


def locked_memory(site: Site, infiniband: Path = INFINIBAND) -> list[Result]:
    """Memory that the network cards may read is not limited. Only for InfiniBand and RoCE between hosts."""
    if site.device.type != "cuda" or not site.has_several_hosts:
        return [Result("locked_memory", State.skipped, "no GPUs on several hosts")]
    if not infiniband.is_dir() or not any(infiniband.iterdir()):
        return [Result("locked_memory", State.skipped, "this host has no InfiniBand or RoCE card")]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return [Result("locked_memory", State.ok, "not limited")]
    what = f"at most {in_units(limit)} of locked memory; NCCL locks the buffers of its network cards"
    fix = "set `ulimit -l unlimited` (docker run --ulimit memlock=-1; memlock in limits.conf)"
    return [Result("locked_memory", State.warning, what, fix)]


def shared_memory(site: Site, directory: Path = SHARED_MEMORY) -> list[Result]:
    """/dev/shm is large enough for what uses it: NCCL between GPUs of a host, and loader workers.

    Nothing else does: gloo and the training process itself use none, and DeepSpeed on CPUs only if LOCAL_SIZE
    is set, which torchrun does not set.
    """
    cfg, needs = site.cfg, {}
    if site.device.type == "cuda" and site.local_ranks > 1:
        needs["NCCL"] = NCCL_SHARED_MEMORY
    if cfg.data.num_workers:
        sequences = max(cfg.trainer.micro_batch_size, cfg.evaluation.micro_batch_size)
        batch = sequences * cfg.objective.sequences_per_sample * cfg.data.sequence_length * TOKEN_BYTES
        workers = site.local_ranks * cfg.data.num_workers
        needs["loader workers"] = workers * BATCHES_PER_WORKER * batch
    if not needs:
        return [Result("shared_memory", State.skipped, "this run uses none")]
    need, names = sum(needs.values()), " and ".join(needs)
    try:
        free = free_bytes(directory)
    except OSError as error:
        what = f"{directory} cannot be used: {error.strerror}; {names} may need {in_units(need)}"
        return [Result("shared_memory", State.warning, what, "mount a tmpfs there")]
    if free is None or free >= need:
        return [Result("shared_memory", State.ok, f"{names}: {in_units(need)} of {directory}")]
    what = f"{directory} has {in_units(free)} free; {names} may need {in_units(need)}"
    fix = (
        f"make it larger: docker run --shm-size={-(-need // GIB)}g, an emptyDir with medium Memory in "
        "Kubernetes, or `mount -o remount,size=...`"
    )
    if "loader workers" in needs:
        fix += "; data.num_workers=0 does without workers"
    return [Result("shared_memory", State.warning, what, fix)]


def run_directory(site: Site) -> list[Result]:
    """Files can be written where run_dir is, or is to be."""
    place = existing_parent(Path(site.cfg.run_dir))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        what = f"run_dir={site.cfg.run_dir}: no file can be written in {place}: {error.strerror}"
        fix = "set run_dir to a directory that this user may write, on a file system with free space"
        return [Result("run_directory", State.failed, what, fix)]
    return [Result("run_directory", State.ok, f"files can be written in {place}")]


def disk_space(site: Site) -> list[Result]:
    """The disk has space for the checkpoints and exports of the run."""
    if site.errors:
        return [Result("disk_space", State.skipped, "the configuration has errors")]
    plan = disk_use(site)
    run_dir = Path(site.cfg.run_dir)
    saved, last_step = complete_checkpoints(run_dir), known_last_step(site.cfg)
    if saved and last_step is not None and step_of(saved[0]) >= last_step:
        return [Result("disk_space", State.skipped, "the run is complete")]
    there = sum(file.stat().st_size for path in saved for file in path.iterdir())
    try:
        free = free_bytes(existing_parent(run_dir))
    except OSError as error:
        return [Result("disk_space", State.skipped, f"run_dir={run_dir}: {error.strerror}")]
    if free is None:
        return [Result("disk_space", State.skipped, f"the file system of {run_dir} does not say its size")]
    need = max(plan.checkpoint, plan.total - there)
    counts = f"{plan.checkpoints} checkpoint{'s' * (plan.checkpoints != 1)} of {in_units(plan.checkpoint)}"
    if plan.exports:
        counts += f" and {plan.exports} export{'s' * (plan.exports != 1)} of {in_units(plan.export)}"
    values = {
        "free_bytes": free,
        "needed_bytes": need,
        "checkpoint_bytes": plan.checkpoint,
        "checkpoints": plan.checkpoints,
    }
    if free >= need:
        what = f"{in_units(free)} free; {in_units(need)} needed for {counts}"
        return [Result("disk_space", State.ok, what, values=values)]
    if free < plan.checkpoint:
        one = in_units(plan.checkpoint)
        what = f"run_dir={run_dir}: {in_units(free)} free, less than one checkpoint of {one}"
        fix = "free some space, or set run_dir to another file system"
        return [Result("disk_space", State.failed, what, fix, values)]
    what = f"run_dir={run_dir}: {in_units(free)} free; the run needs up to {in_units(need)}: {counts}"
    fix = "free some space, set run_dir to another file system, or lower checkpoint.keep (0 keeps all)"
    if site.cfg.checkpoint.keep_every:
        fix += ", or raise checkpoint.keep_every"
    if plan.exports:
        fix += ", or raise checkpoint.export_every"
    return [Result("disk_space", State.warning, what, fix, values)]


def disk_use(site: Site) -> DiskPlan:
    """What the run keeps on disk. trainer.max_epochs alone does not say how many steps there are."""
    cfg = site.cfg
    averaged = cfg.trainer.ema_decay is not None
    last_step, adapter = known_last_step(cfg), adapter_plan(cfg.adapter)
    return disk_plan(cfg.checkpoint, olmoe_config(cfg.model), adapter, cfg.optimizer, averaged, last_step)


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def free_bytes(directory: Path) -> int | None:
    """Bytes that this user may still write; None: the file system does not say, as some network ones."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize if found.f_blocks else None
