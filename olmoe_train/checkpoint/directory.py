"""Directories of checkpoints: which there are, which are complete and undamaged, which to keep.

XXH3 hashes, since a hash has to keep up with the disk (13.9 GiB/s against 1.6 of SHA-256 on one core); they
guard against damage, not against forgery.
"""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import xxhash

from olmoe_train.utils.errors import UserError

STATE, MANIFEST = "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError):
    """A damaged checkpoint; the message names it and the file."""


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
    return sorted(found, key=step_of, reverse=True)


def incomplete_checkpoints(run_dir: Path) -> list[Path]:
    """Directories with a checkpoint's name that are none: damaged after they were saved."""
    found = (path for path in (Path(run_dir) / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(path for path in found if not is_complete(path))


def set_aside(checkpoint: Path) -> Path:
    """Keep a damaged checkpoint under another name, which is returned: its step will be saved again."""
    names = (f"{checkpoint.name}.damaged{number or ''}" for number in itertools.count())
    free = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    return checkpoint.rename(free)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The finished checkpoint with the highest step."""
    return next(iter(complete_checkpoints(run_dir)), None)


def step_of(directory: Path) -> int:
    match = _NAME.fullmatch(directory.name)
    assert match is not None, directory
    return int(match[1])


def superseded(run_dir: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """The finished checkpoints that retention gives up: all but the `keep` newest, and those of steps that
    keep_every divides. keep 0: none; keep_every 0: the newest alone are kept."""
    older = complete_checkpoints(run_dir)[keep:] if keep else []
    return [path for path in older if not (keep_every and step_of(path) % keep_every == 0)]


def delete(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        # Under another name first, so that a half-deleted one is never taken for a checkpoint.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.deleting")))


def verify(directory: Path, names: list[str] | None = None) -> None:
    """Check these files (None: all) by the manifest's hashes. CheckpointError names the first bad one."""
    files = read_manifest(directory)["files"]
    if unknown := {path.name for path in directory.iterdir()} - files.keys() - {MANIFEST}:
        raise CheckpointError(f"{directory}: {min(unknown)} is not part of this checkpoint")
    for name in names if names is not None else files:
        try:
            found = entry_of(directory / name)
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


def entry_of(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(8 * 1024**2):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
