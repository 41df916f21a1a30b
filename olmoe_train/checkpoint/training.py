"""Training checkpoints: written by all ranks, committed by one rename, verified before they are loaded.

    run_dir/checkpoints/step-00000100/
        shard-RRRRR-model-FFFFF-of-NNNNN.safetensors   rank RRRRR's shards of parameters and AdamW moments
        state.json      what the caller passes, and AdamW's step count of each parameter
        manifest.json   size and hash of every other file; written last

torch.distributed.checkpoint writes the safetensors, and cuts them anew for any other number and layout of
ranks. Nothing is pickled. torch loads a flipped bit, or a checkpoint that lacks a rank's file, without a
word; the hashes are what makes reading safe. XXH3, since a hash has to keep up with the disk (13.9 GiB/s
against 1.6 of SHA-256 on one core); it guards against damage, not against forgery.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule

from olmoe_train.errors import UserError
from olmoe_train.files import sync

STATE, MANIFEST = "state.json", "manifest.json"
# AdamW's state of a parameter, besides its step count.
MOMENTS = ("exp_avg", "exp_avg_sq")
# A rank's files are about this long: the writer makes each in memory first.
FILE_BYTES = 2 * 1024**3
_NAME = re.compile(r"step-(\d{8,})")
Result = TypeVar("Result")


class CheckpointError(UserError):
    """A damaged checkpoint; the message names it and the file."""


# --- which there are --------------------------------------------------------------------------------------


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or would be."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def is_complete(directory: Path) -> bool:
    """Whether `directory` is a finished checkpoint: the one predicate for resume, retention and every verb.

    It has its final name, its manifest, and every file listed there at its full size.
    """
    if not _NAME.fullmatch(directory.name):
        return False
    try:
        files = read_manifest(directory)["files"]
        return all((directory / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (CheckpointError, OSError):
        return False


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run by step, the newest first."""
    found = [path for path in (Path(run_dir) / "checkpoints").glob("step-*") if is_complete(path)]
    return sorted(found, key=_step, reverse=True)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The finished checkpoint with the highest step."""
    return next(iter(complete_checkpoints(run_dir)), None)


def prune(run_dir: Path, keep: int) -> None:
    """Delete all finished checkpoints but the `keep` newest (0: none). Rank 0 does; others do not wait."""
    if keep and dist.get_rank() == 0:
        for path in complete_checkpoints(run_dir)[keep:]:
            # Under another name first, so that a half-deleted one is never taken for a checkpoint.
            doomed = path.rename(path.with_name(f".{path.name}.deleting"))
            shutil.rmtree(doomed)


def _step(directory: Path) -> int:
    match = _NAME.fullmatch(directory.name)
    assert match is not None, directory
    return int(match[1])


# --- writing ----------------------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` and return its directory, once it is on disk; collective.

    state: JSON values, taken from rank 0. Raises, on every rank: UserError if the checkpoint is there already
    (nothing is ever overwritten), RuntimeError naming the rank that could not write.
    """
    directory = checkpoint_path(run_dir, step)
    partial = directory.with_name(f".{directory.name}.partial")
    _on_rank_0(lambda: _start(directory, partial))
    tensors, adam_steps = _training_tensors(model, optimizer)
    writer = HuggingFaceStorageWriter(str(partial), _files(tensors), save_distributed=True)
    state_dict_saver.save(tensors, storage_writer=writer)
    # DCP counts the shards of rank 0 as 1; each rank hashes its own, which are still in its page cache.
    own = sorted(partial.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"))
    hashes = _everywhere(lambda: {path.name: _entry(path) for path in own})
    files = {name: entry for of_rank in hashes for name, entry in of_rank.items()}
    content = {"state": state, "adam_steps": adam_steps}
    _on_rank_0(lambda: _commit(directory, partial, files, content))
    return directory


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
        "step": _step(directory),
        "world_size": dist.get_world_size(),
        "files": dict(sorted((files | {STATE: _entry(partial / STATE)}).items())),
    }
    _write_json(partial / MANIFEST, manifest)
    sync(partial)
    partial.rename(directory)
    sync(directory.parent)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of the file (from 1) that it is written to, in each rank's set of files."""
    numbers, written = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + written // (FILE_BYTES * dist.get_world_size())
        written += tensor.nbytes
    return numbers


def _entry(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(8 * 1024**2):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


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
    files = sorted(read_manifest(directory)["files"])
    share = files[dist.get_rank() :: dist.get_world_size()]
    _everywhere(lambda: verify(directory, share))
    content = json.loads((directory / STATE).read_text())
    if optimizer is not None:
        _make_adam_state(model, optimizer, content["adam_steps"])
    tensors, _ = _training_tensors(model, optimizer)
    reader = HuggingFaceStorageReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
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


def verify(directory: Path, names: list[str] | None = None) -> None:
    """Check these files (None: all) by the manifest's hashes. CheckpointError names the first bad one."""
    files = read_manifest(directory)["files"]
    if unknown := {path.name for path in directory.iterdir()} - files.keys() - {MANIFEST}:
        raise CheckpointError(f"{directory}: {min(unknown)} is not part of this checkpoint")
    for name in names if names is not None else files:
        try:
            found = _entry(directory / name)
        except OSError as error:
            raise CheckpointError(f"{directory}: {name} cannot be read: {error.strerror}") from None
        if found != files[name]:
            raise CheckpointError(f"{directory}: {name} is damaged: {found}, in the manifest {files[name]}")


def read_manifest(directory: Path) -> dict[str, Any]:
    """manifest.json, whose files all lie in `directory`. CheckpointError if it is missing or damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        names = list(manifest["files"])
        assert all(entry.keys() == {"bytes", "xxh3_128"} for entry in manifest["files"].values())
    except OSError as error:
        raise CheckpointError(f"{directory}: no readable {MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise CheckpointError(f"{directory}: {MANIFEST} is damaged") from None
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{directory}: {MANIFEST} lists files outside of the checkpoint")
    return manifest


# --- what is in it ----------------------------------------------------------------------------------------


def _training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(Every tensor of the training state by its name on disk, AdamW's step count by parameter name)."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()  # a forward pass without backward leaves whole parameters in the root's place
    tensors, steps = {}, {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        state = optimizer.state.get(parameter) if optimizer is not None else None
        if state:
            steps[name] = state["step"]
            tensors |= {f"optim.{moment}.{name}": state[moment] for moment in MOMENTS}
    # One copy to the host for all of them, rather than one a parameter.
    counts = torch.stack(list(steps.values())).tolist() if steps else []
    return tensors, dict(zip(steps, counts, strict=True))


def _make_adam_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, adam_steps: dict[str, float]
) -> None:
    """Room for AdamW's state, which it would else make at its first step; laid out as the parameters are."""
    for name, parameter in model.named_parameters():
        if name in adam_steps:
            step = torch.tensor(adam_steps[name], dtype=torch.float32, device=parameter.device)
            moments = {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
            optimizer.state[parameter] = {"step": step, **moments}


# --- ranks in step ----------------------------------------------------------------------------------------


def _everywhere(work: Callable[[], Result]) -> list[Result]:
    """Run on every rank and give every rank all results; where one fails, all raise what it raised.

    UserErrors as they are; anything else as a RuntimeError that names the rank.
    """
    outcome: Result | Exception
    try:
        outcome = work()
    except UserError as error:
        outcome = error
    except Exception as error:
        outcome = RuntimeError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    for result in outcomes:
        if isinstance(result, Exception):
            raise result
    return outcomes


def _on_rank_0(work: Callable[[], None]) -> None:
    """Run on rank 0 while the others wait for it."""
    _everywhere(work if dist.get_rank() == 0 else lambda: None)
