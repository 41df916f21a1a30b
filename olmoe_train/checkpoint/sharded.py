"""Training checkpoints: written by all ranks, committed by one rename, verified before they are loaded.

    run_dir/checkpoints/step-00000100/
        shard-RRRRR-model-FFFFF-of-NNNNN.safetensors   rank RRRRR's shards of parameters and AdamW moments
        state.json      what the caller passes, and AdamW's step count of each parameter
        manifest.json   size and hash of every other file; written last

torch.distributed.checkpoint writes the safetensors, and cuts them anew for any other number and layout of
ranks. Nothing is pickled. torch loads a flipped bit, or a checkpoint that lacks a rank's file, without a
word; the hashes are what makes reading safe.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
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
from torch.distributed.fsdp import FSDPModule

from olmoe_train.checkpoint.directory import (
    MANIFEST,
    STATE,
    checkpoint_path,
    entry_of,
    read_manifest,
    step_of,
    verify,
)
from olmoe_train.distributed.collectives import Group, everywhere, on_rank_0
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import fsync_path

# AdamW's state of a parameter, besides its step count.
MOMENTS = ("exp_avg", "exp_avg_sq")
# A rank's files are about this long: the writer makes each in memory first.
FILE_BYTES = 2 * 1024**3


# --- writing ----------------------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` and return its directory, once it is on disk; collective.

    state: JSON values, taken from rank 0. Raises, on every rank: UserError if the checkpoint is there already
    (nothing is ever overwritten), RuntimeError naming the rank that could not write.
    """
    return write_checkpoint(run_dir, step, take_snapshot(model, optimizer), state)


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of the training state at one step."""

    tensors: dict[str, Tensor]
    adam_steps: dict[str, float]


def take_snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, stager: BlockingAsyncStager | None = None
) -> Snapshot:
    """What write_checkpoint writes. stager: copies it to the host's memory, so that training may go on.

    Collective; FloatingPointError on every rank where a value is not finite.
    """
    tensors, adam_steps = _training_tensors(model, optimizer)
    shards = [shard for shard in map(local_tensor, tensors.values()) if shard.numel()]
    finite = torch.stack(torch._foreach_norm(shards, math.inf)).isfinite().all() if shards else True
    bad = [rank for rank, of_rank in enumerate(everywhere(lambda: bool(finite))) if not of_rank]
    if bad:
        raise FloatingPointError(f"not saved: parameters or moments on rank {bad[0]} are not finite")
    return Snapshot(stager.stage(tensors) if stager is not None else tensors, adam_steps)


def write_checkpoint(
    run_dir: Path, step: int, snapshot: Snapshot, state: dict[str, Any], group: Group = None
) -> Path:
    """save_checkpoint of a snapshot, by the collectives of `group`."""
    tensors = snapshot.tensors
    directory = checkpoint_path(run_dir, step)
    partial = directory.with_name(f".{directory.name}.partial")
    on_rank_0(lambda: _start(directory, partial), group)
    try:
        writer = HuggingFaceStorageWriter(str(partial), _files(tensors), save_distributed=True)
        _write_shards(tensors, writer, group)
        # DCP counts the shards of rank 0 as 1; each rank hashes its own, which are still in its page cache.
        own = sorted(partial.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"))
        hashes = everywhere(lambda: {path.name: entry_of(path) for path in own}, group)
        files = {name: entry for of_rank in hashes for name, entry in of_rank.items()}
        content = {"state": state, "adam_steps": snapshot.adam_steps}
        on_rank_0(lambda: _commit(directory, partial, files, content), group)
    except Exception:
        if dist.get_rank() == 0:  # what is in it may be what fills the disk
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def verify_together(directory: Path, group: Group = None) -> None:
    """Check every file by its hash, the files shared out over the ranks; CheckpointError on all of them."""
    files = sorted(read_manifest(directory)["files"])
    share = files[dist.get_rank() :: dist.get_world_size()]
    everywhere(lambda: verify(directory, share), group)


def _start(directory: Path, partial: Path) -> None:
    if directory.exists():
        raise UserError(
            f"{directory} exists already and is not overwritten: continue from it (checkpoint.resume=auto), "
            "move it away, or use another run_dir"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left_over in directory.parent.glob(".step-*"):  # of a run that was killed here
        shutil.rmtree(left_over)
    partial.mkdir()


def _commit(directory: Path, partial: Path, files: dict[str, Any], content: dict[str, Any]) -> None:
    """Make the written directory a checkpoint: the other files, the manifest, the rename."""
    seen = {path.name for path in partial.iterdir()}
    if seen != files.keys():
        lost = sorted(files.keys() - seen) or sorted(seen - files.keys())
        raise UserError(
            f"{partial}: rank 0 does not see what the ranks wrote ({lost[0]} and {len(lost) - 1} more): "
            "run_dir must be on a file system that all nodes share"
        )
    _write_json(partial / STATE, content)
    manifest = {
        "format": 1,
        "step": step_of(directory),
        "world_size": dist.get_world_size(),
        "files": dict(sorted((files | {STATE: entry_of(partial / STATE)}).items())),
    }
    _write_json(partial / MANIFEST, manifest)
    fsync_path(partial)
    partial.rename(directory)
    fsync_path(directory.parent)


def _write_shards(tensors: dict[str, Tensor], writer: HuggingFaceStorageWriter, group: Group) -> None:
    try:
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # no Exception, but a BaseException
        failures = (f"rank {r}: {type(e).__name__}: {e}" for r, (e, _) in error.failures.items())
        raise RuntimeError("; ".join(failures)) from None


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of the file (from 1) that it is written to, in each rank's set of files."""
    numbers, written = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + written // (FILE_BYTES * dist.get_world_size())
        written += tensor.nbytes
    return numbers


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


# --- reading ----------------------------------------------------------------------------------------------


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Fill the model, and AdamW's state if given, from a checkpoint of any layout; return the saved state.

    Collective. Every file's hash is checked first, the files shared out over the ranks. Raises on every rank
    CheckpointError if the checkpoint is damaged, UserError if it does not fit; the model is untouched then.
    """
    directory = Path(directory)
    verify_together(directory)
    content = _read_state(directory)
    reader = HuggingFaceStorageReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
    if optimizer is not None:
        _make_optimizer_state(model, optimizer, content["adam_steps"], stored)
    tensors, _ = _training_tensors(model, optimizer)
    sizes = {
        name: list(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)
    }
    wrong = {name: t for name, t in tensors.items() if sizes.get(name) != list(t.shape)}
    if wrong:
        lines = [
            f"{name} is {sizes.get(name, 'absent')} there, {list(t.shape)} here" for name, t in wrong.items()
        ]
        raise UserError("\n  ".join([f"{directory} is another model's:", *lines[:5]]))
    state_dict_loader.load(tensors, storage_reader=reader)
    return content["state"]


def saved_state(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint without its tensors; no communication. CheckpointError if it is damaged."""
    verify(directory, [STATE])
    state: dict[str, Any] = _read_state(directory)["state"]
    return state


def _read_state(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
    return content


def open_model_tensors(directory: Path) -> Callable[[str], Tensor]:
    """A function that reads one whole parameter by name from a checkpoint of any layout; for one process.

    It returns CPU tensors in their stored dtype. CheckpointError if a file is damaged; KeyError for a name
    that is not there.
    """
    directory = Path(directory)
    verify(directory)
    pieces: dict[str, list[tuple[Any, list[int]]]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = safe_open(path, framework="pt")
        for key, saved in json.loads(file.metadata()["DCP_SHARDING_INFO"]).items():
            pieces.setdefault(key, []).append((file, saved["saved_offsets"]))

    def read(name: str) -> Tensor:
        key = f"model.{name}"
        parts = [(file.get_tensor(key), offsets) for file, offsets in pieces[key]]
        if len(parts) == 1:
            return parts[0][0]
        ends = [[o + n for o, n in zip(offsets, part.shape, strict=True)] for part, offsets in parts]
        whole = parts[0][0].new_empty([max(of_dim) for of_dim in zip(*ends, strict=True)])
        for (part, offsets), end in zip(parts, ends, strict=True):
            whole[tuple(slice(o, e) for o, e in zip(offsets, end, strict=True))] = part
        return whole

    return read


def model_tensor_names(directory: Path) -> set[str]:
    """Names of all parameters and buffers that a checkpoint holds of the model; for one process."""
    names: set[str] = set()
    for path in Path(directory).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(json.loads(file.metadata()["DCP_SHARDING_INFO"]))
    return {name.removeprefix("model.") for name in names if name.startswith("model.")}


# --- what is in it ----------------------------------------------------------------------------------------


def _training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(Every tensor of the training state by its name on disk; the optimizer's step count by parameter name).

    Any optimizer can be saved whose state of a parameter is tensors of the parameter's shape, and perhaps a
    step count: AdamW's moments, SGD's momentum.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()  # a forward pass without backward leaves whole parameters in the root's place
    tensors, steps = {}, {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        state = optimizer.state.get(parameter) if optimizer is not None else None
        for key, value in (state or {}).items():
            if key == "step":
                steps[name] = value
            elif isinstance(value, Tensor):
                tensors[f"optim.{key}.{name}"] = value
    for name, buffer in persistent_buffers(model).items():
        tensors[f"model.{name}"] = buffer
    # One copy to the host for all of them, rather than one a parameter.
    counts = torch.stack(list(steps.values())).tolist() if steps else []
    return tensors, dict(zip(steps, counts, strict=True))


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the training state, by name; each is equal on all ranks."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _make_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: dict[str, float], stored: Iterable[str]
) -> None:
    """Allocate the optimizer's state in the parameters' layout, before its first step would.

    steps: step count by parameter name. stored: names of the tensors of the checkpoint.
    """
    keys: dict[str, list[str]] = {}
    for tensor_name in stored:
        kind, _, rest = tensor_name.partition(".")
        if kind == "optim":
            key, _, name = rest.partition(".")
            keys.setdefault(name, []).append(key)
    for name, parameter in model.named_parameters():
        state = {key: torch.zeros_like(parameter, requires_grad=False) for key in sorted(keys.get(name, ()))}
        if name in steps:
            step = torch.tensor(steps[name], dtype=torch.float32, device=parameter.device)
            state = {"step": step, **state}
        if state:
            optimizer.state[parameter] = state
