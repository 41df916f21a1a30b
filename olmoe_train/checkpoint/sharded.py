"""Training checkpoints: all ranks write them, one rename commits them, and loading verifies them first.

    run_dir/checkpoints/step-00000100/
        shard-RRRRR-model-FFFFF-of-NNNNN.safetensors   rank RRRRR's shards of parameters and AdamW moments
        state.json      the caller's state, and AdamW's step count per parameter
        manifest.json   size and hash of every other file; written last

torch.distributed.checkpoint (DCP) writes the safetensors files, and reshards them when a run with another
number or layout of ranks loads them. Nothing is pickled. torch reports no error for a flipped bit or for a
rank's missing file. The hashes in the manifest detect both.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from olmoe_train.checkpoint.directory import (
    MANIFEST,
    STATE,
    checkpoint_path,
    entry_of,
    read_manifest,
    step_of,
    verify,
)
from olmoe_train.checkpoint.optimizer_state import make_optimizer_state
from olmoe_train.config.choices import Weights
from olmoe_train.distributed.collectives import Group, gather_from_all, on_rank_0
from olmoe_train.distributed.fsdp import reshard
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.distributed.rendezvous import place_of
from olmoe_train.optim.average import AVERAGE
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import fsync_path, publish_directory, write_json

# Approximate size of a rank's files, in bytes. The writer builds each file in memory first.
FILE_BYTES = 2 * 1024**3
# First part of a tensor's name on disk -> which weights of the model these tensors are.
PREFIXES = {Weights.weights: "model.", Weights.ema: f"optim.{AVERAGE}."}


# --- writing ----------------------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` and return its directory when it is on disk. Collective.

    Args:
        run_dir: The run's directory.
        step: The step of the checkpoint.
        model: The model, with sharded parameters.
        optimizer: The optimizer of these parameters.
        state: JSON values. Rank 0's values are saved.

    Raises:
        UserError: On every rank, if the checkpoint exists already. No checkpoint is ever overwritten.
        FloatingPointError: On every rank, if a value is not finite.
        RuntimeError: On every rank, if a rank could not write. The message names the rank.
    """
    return write_checkpoint(run_dir, step, take_snapshot(model, optimizer), state)


@dataclass(frozen=True)
class Snapshot:
    """This rank's shard of the training state at one step.

    tensors: Tensors by their name on disk. adam_steps: The optimizer's step count by parameter name.
    """

    tensors: dict[str, Tensor]
    adam_steps: dict[str, float]


def take_snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, stager: BlockingAsyncStager | None = None
) -> Snapshot:
    """Take the snapshot that `write_checkpoint` writes. Collective.

    Args:
        model: The model, with sharded parameters.
        optimizer: The optimizer of these parameters.
        stager: Copies the tensors to host memory, so that training can continue. None makes no copy.

    Raises:
        FloatingPointError: On every rank, if a parameter or moment on any rank is not finite.
    """
    tensors, steps = training_tensors(model, optimizer)
    # One copy to the host for all step counts, instead of one copy per parameter.
    counts = torch.stack(list(steps.values())).tolist() if steps else []
    adam_steps = dict(zip(steps, counts, strict=True))
    shards = [shard for shard in map(local_tensor, tensors.values()) if shard.numel()]
    finite = torch.stack(torch._foreach_norm(shards, math.inf)).isfinite().all() if shards else True
    bad = [rank for rank, of_rank in enumerate(gather_from_all(lambda: bool(finite))) if not of_rank]
    if bad:
        raise FloatingPointError(f"not saved: parameters or moments on rank {bad[0]} are not finite")
    return Snapshot(stager.stage(tensors) if stager is not None else tensors, adam_steps)


def write_checkpoint(
    run_dir: Path, step: int, snapshot: Snapshot, state: dict[str, Any], group: Group = None
) -> Path:
    """Write a snapshot as `save_checkpoint` does, with the collectives of `group`."""
    tensors = snapshot.tensors
    directory = checkpoint_path(run_dir, step)
    partial = directory.with_name(f".{directory.name}.partial")
    on_rank_0(lambda: _start(directory, partial), group)
    try:
        writer = HuggingFaceStorageWriter(str(partial), file_numbers(tensors), save_distributed=True)
        _write_shards(tensors, writer, group)
        # DCP numbers the shards of rank 0 as 1. Each rank hashes its own files, which are still in its page
        # cache.
        written = sorted(partial.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"))
        hashes = gather_from_all(lambda: {path.name: entry_of(path) for path in written}, group)
        files = {name: entry for of_rank in hashes for name, entry in of_rank.items()}
        content = {"state": state, "adam_steps": snapshot.adam_steps}
        on_rank_0(lambda: _commit(directory, partial, files, content), group)
    except Exception:
        if dist.get_rank() == 0:  # the partial files may be what fills the disk
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def verify_together(directory: Path, group: Group = None) -> None:
    """Check every file by its hash. Each rank checks a share of the files. Collective.

    Raises:
        CheckpointError: On every rank, if a file is missing or damaged.
    """
    files = sorted(read_manifest(directory)["files"])
    share = files[dist.get_rank() :: dist.get_world_size()]
    gather_from_all(lambda: verify(directory, share), group)


def _start(directory: Path, partial: Path) -> None:
    if directory.exists():
        raise UserError(
            f"{directory} exists already and is not overwritten: continue from it (checkpoint.resume=auto), "
            "move it away, or use another run_dir"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left_over in directory.parent.glob(".step-*"):  # left by a run that was killed while it saved
        shutil.rmtree(left_over)
    partial.mkdir()


def _commit(directory: Path, partial: Path, files: dict[str, Any], content: dict[str, Any]) -> None:
    """Turn the written directory into a checkpoint: write state.json and the manifest, then rename it."""
    seen = {path.name for path in partial.iterdir()}
    if seen != files.keys():
        lost = sorted(files.keys() - seen) or sorted(seen - files.keys())
        raise UserError(
            f"{partial}: rank 0 does not see what the ranks wrote ({lost[0]} and {len(lost) - 1} more): "
            "run_dir must be on a file system that all nodes share"
        )
    write_json(partial / STATE, content)
    fsync_path(partial / STATE)
    manifest = {
        "format": 1,
        "step": step_of(directory),
        "world_size": dist.get_world_size(),
        "files": dict(sorted((files | {STATE: entry_of(partial / STATE)}).items())),
    }
    write_json(partial / MANIFEST, manifest)
    fsync_path(partial / MANIFEST)
    publish_directory(partial, directory)


def _write_shards(tensors: dict[str, Tensor], writer: HuggingFaceStorageWriter, group: Group) -> None:
    try:
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # derives from BaseException, not from Exception
        places = gather_from_all(lambda: place_of(dist.get_rank()), group)
        failures = (f"{places[rank]}: {type(e).__name__}: {e}" for rank, (e, _) in error.failures.items())
        raise RuntimeError(f"{writer.path}: {'; '.join(failures)}") from None


def file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Map each tensor name to the number of its file, counted from 1, within each rank's set of files."""
    numbers, written = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + written // (FILE_BYTES * dist.get_world_size())
        written += tensor.nbytes
    return numbers


# --- reading ----------------------------------------------------------------------------------------------


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Load a checkpoint of any layout into the model and the optimizer. Collective.

    The hash of every file is checked first. Each rank checks a share of the files.

    Args:
        directory: The checkpoint.
        model: The model to fill in place.
        optimizer: The optimizer whose state is filled in place, as far as its rules need what is stored
            (optimizer_state.py). None loads only the model.

    Returns:
        The state that the caller of `save_checkpoint` passed.

    Raises:
        CheckpointError: On every rank, if the checkpoint is damaged. The model is not changed.
        UserError: On every rank, if the shapes differ from the model's. The model is not changed.
    """
    directory = Path(directory)
    verify_together(directory)
    content = _read_state(directory)
    reader = HuggingFaceStorageReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
    reshard(model)
    if optimizer is not None:
        make_optimizer_state(directory, model, optimizer, content["adam_steps"], stored)
    tensors, _ = training_tensors(model, optimizer)
    refuse_other_model(directory, tensors, stored)
    state_dict_loader.load(tensors, storage_reader=reader)
    return content["state"]


def refuse_other_model(directory: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> None:
    """Raise a UserError if a checkpoint lacks a tensor of `tensors`, or has one of another shape.

    Args:
        directory: The checkpoint.
        tensors: Tensors by their name on disk.
        stored: DCP's metadata of the checkpoint by name (`stored_metadata`).
    """
    sizes = {
        name: list(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
    }
    wrong = {name: t for name, t in tensors.items() if sizes.get(name) != list(t.shape)}
    if wrong:
        lines = [
            f"{name} is {sizes.get(name, 'absent')} there, {list(t.shape)} here" for name, t in wrong.items()
        ]
        raise UserError("\n  ".join([f"{directory} is another model's:", *lines[:5]]))


def stored_metadata(directory: Path) -> dict[str, Any]:
    """Return DCP's metadata of the tensors of a checkpoint by name. Only the headers of files are read."""
    return dict(HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata)


def saved_state(directory: Path) -> dict[str, Any]:
    """Return the saved state of a checkpoint, without its tensors and without communication.

    Raises:
        CheckpointError: state.json or the manifest is missing or damaged.
    """
    verify(directory, [STATE])
    state: dict[str, Any] = _read_state(directory)["state"]
    return state


def _read_state(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
    return content


def open_model_tensors(directory: Path, which: Weights = Weights.weights) -> Callable[[str], Tensor]:
    """Open a checkpoint of any layout in one process.

    Args:
        directory: The checkpoint.
        which: The weights, or their average (trainer.ema_decay).

    Returns:
        A function that reads one full tensor of the model by name. The tensor is on the CPU, in its stored
        dtype. The average of a tensor that is not trained is the tensor. The function raises KeyError if the
        checkpoint has no tensor of that name.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    directory = Path(directory)
    verify(directory)
    pieces: dict[str, list[tuple[Any, list[int]]]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        for key, saved in json.loads(file.metadata()["DCP_SHARDING_INFO"]).items():
            pieces.setdefault(key, []).append((file, saved["saved_offsets"]))

    def read(name: str) -> Tensor:
        key = f"{PREFIXES[which]}{name}"
        if key not in pieces:
            key = f"{PREFIXES[Weights.weights]}{name}"
        parts = [(file.get_tensor(key), offsets) for file, offsets in pieces[key]]
        if len(parts) == 1:
            return parts[0][0]
        ends = [[o + n for o, n in zip(offsets, part.shape, strict=True)] for part, offsets in parts]
        whole = parts[0][0].new_empty([max(of_dim) for of_dim in zip(*ends, strict=True)])
        for (part, offsets), end in zip(parts, ends, strict=True):
            whole[tuple(slice(o, e) for o, e in zip(offsets, end, strict=True))] = part
        return whole

    return read


def model_tensor_names(directory: Path, which: Weights = Weights.weights) -> set[str]:
    """Return the names of all parameters and buffers of the model in a checkpoint. For one process.

    which=ema: only of those that have an average.
    """
    names: set[str] = set()
    for path in Path(directory).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(json.loads(file.metadata()["DCP_SHARDING_INFO"]))
    prefix = PREFIXES[which]
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


# --- what is in it ----------------------------------------------------------------------------------------


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors by their name on disk, and the optimizer's step count by parameter name.

    This works for any optimizer whose state per parameter is tensors of the parameter's shape and an optional
    step count, for example AdamW's moments or SGD's momentum.
    """
    reshard(model)
    is_adapted = getattr(model, "adapter", None) is not None
    tensors, steps = {}, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and is_adapted:
            continue  # the frozen base of an adapter is not part of a checkpoint
        tensors[f"model.{name}"] = parameter.detach()
        state = optimizer.state.get(parameter) if optimizer is not None else None
        for key, value in (state or {}).items():
            if key == "step":
                steps[name] = value
            elif isinstance(value, Tensor):
                tensors[f"optim.{key}.{name}"] = value
    for name, buffer in persistent_buffers(model).items():
        tensors[f"model.{name}"] = buffer
    return tensors, steps


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of the training state by name. Each buffer has the same values on all ranks."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
