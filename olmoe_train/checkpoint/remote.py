"""Checkpoints in an object store: upload, list, download, and retention.

The store mirrors the run directory: URL/config.yaml, URL/metrics.jsonl, URL/tokenizer/, and
URL/checkpoints/step-00000100/. Objects have no rename, so the manifest takes its place: it is uploaded when
every other file of the checkpoint has arrived, and is deleted first. A checkpoint without its manifest does
not exist.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from olmoe_train.checkpoint.directory import (
    MANIFEST,
    CheckpointError,
    checkpoint_path,
    entry_of,
    is_complete,
    latest_checkpoint,
    parse_manifest,
    step_of,
    superseded_steps,
)
from olmoe_train.model.hf.remote import remote_directory
from olmoe_train.utils import object_store
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_write_text, file_lock, fsync_path, publish_directory
from olmoe_train.utils.object_store import join
from olmoe_train.utils.redaction import redact_text

log = logging.getLogger(__name__)
RECORDS = ("metrics.jsonl", "alerts.json", "wandb.json")
"""Files of a run directory that a run on another machine continues."""
_DESCRIPTION = ("config.yaml", *RECORDS)
_STEP = re.compile(r"step-(\d{8,})")
_DOWNLOADS = 4  # files at a time; one connection rarely fills a network link


def upload_checkpoint(checkpoint: Path, url: str) -> bool:
    """Upload a complete checkpoint, the manifest last.

    Args:
        checkpoint: Its directory. The name is the step's.
        url: The run's directory in the store.

    Returns:
        False if the store has this very checkpoint already.

    Raises:
        UserError, StoreError: It could not be uploaded.
    """
    target, manifest = join(url, "checkpoints", checkpoint.name), (checkpoint / MANIFEST).read_bytes()
    files = parse_manifest(manifest, str(checkpoint))["files"]
    if MANIFEST in (there := object_store.list_files(target)):
        if _is_whole(files, there) and object_store.read(join(target, MANIFEST)) == manifest:
            return False
        object_store.delete([join(target, MANIFEST)])
    for name in files:
        object_store.upload(checkpoint / name, join(target, name))
    if not _is_whole(files, object_store.list_files(target)):
        raise object_store.StoreError(f"{redact_text(target)}: the store does not list what was uploaded")
    object_store.write(join(target, MANIFEST), manifest)
    return True


def upload_run_files(run_dir: Path, url: str) -> None:
    """Upload what a checkpoint needs beside it: configuration, records of the run, and tokenizer."""
    for path in (*(run_dir / name for name in _DESCRIPTION), *(run_dir / "tokenizer").glob("*")):
        if path.is_file():
            object_store.write(join(url, *path.relative_to(run_dir).parts), path.read_bytes())


def upload_directory(directory: Path, url: str, last: str) -> None:
    """Upload the files directly in a directory. `last` makes the directory valid, and goes last."""
    if last in object_store.list_files(url):
        object_store.delete([join(url, last)])
    files = [path for path in directory.iterdir() if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == last, path.name)):
        object_store.upload(path, join(url, path.name))


def complete_steps(url: str) -> Iterator[tuple[int, bytes]]:
    """Yield (step, manifest) of the complete checkpoints in the store, newest first.

    A checkpoint is complete if it has a manifest, and every file that the manifest lists, at its full size.
    """
    names = object_store.list_directories(join(url, "checkpoints"))
    for step in sorted((int(match[1]) for match in map(_STEP.fullmatch, names) if match), reverse=True):
        target = remote_checkpoint(url, step)
        there = object_store.list_files(target)
        if MANIFEST not in there:
            continue
        content = object_store.read(join(target, MANIFEST))
        try:
            files = parse_manifest(content, redact_text(target))["files"]
        except CheckpointError as error:
            log.warning("WARNING: %s; it is passed over", error)
            continue
        if _is_whole(files, there):
            yield step, content


def remote_checkpoint(url: str, step: int) -> str:
    """The URL of the checkpoint of `step`."""
    return join(url, "checkpoints", checkpoint_path(Path(), step).name)


def download_newest(url: str, run_dir: Path, on_progress: Callable[[], None]) -> Path | None:
    """Bring the newest complete checkpoint of the store into a run directory, if it is newer than all there.

    A damaged one is named, and the one before it is tried. The records of the run come with it.

    Args:
        url: The run's directory in the store.
        run_dir: The run's directory here.
        on_progress: Called from several threads, often.

    Returns:
        The checkpoint; None if the run directory has the newest one already.

    Raises:
        UserError, StoreError: The store cannot be read.
    """
    newest = latest_checkpoint(run_dir)
    for step, manifest in complete_steps(url):
        if newest is not None and step <= step_of(newest):
            return None
        try:
            checkpoint = download_checkpoint(url, step, manifest, run_dir, on_progress)
        except CheckpointError as error:
            log.warning("WARNING: %s; the one before it is tried", error)
            continue
        there = object_store.list_files(url)
        for name in RECORDS:
            if name in there:
                atomic_write_text(run_dir / name, object_store.read(join(url, name)).decode())
        return checkpoint
    return None


def download_checkpoint(
    url: str, step: int, manifest: bytes, run_dir: Path, on_progress: Callable[[], None] = lambda: None
) -> Path:
    """Bring one checkpoint into a run directory. It gets its name once all its files are here and verified.

    A download that was interrupted continues where it ended.

    Raises:
        CheckpointError: A file in the store is not what the manifest says.
        UserError, StoreError: The store cannot be read.
    """
    source, final = remote_checkpoint(url, step), checkpoint_path(run_dir, step)
    files: dict[str, dict[str, Any]] = parse_manifest(manifest, redact_text(source))["files"]
    partial = final.with_name(f".{final.name}.download")
    partial.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():  # of an earlier checkpoint of this step
        if path.name not in files:
            path.unlink()
    log.info(
        "downloading %s (%.1f MB)", redact_text(source), sum(one["bytes"] for one in files.values()) / 1e6
    )
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        jobs = [
            pool.submit(_download_verified, join(source, name), partial / name, entry, on_progress)
            for name, entry in files.items()
        ]
    for job in jobs:
        job.result()
    (partial / MANIFEST).write_bytes(manifest)
    fsync_path(partial / MANIFEST)
    publish_directory(partial, final)
    return final


def _download_verified(url: str, path: Path, entry: dict[str, Any], on_progress: Callable[[], None]) -> None:
    """Download a file until its size and hash are the manifest's: a second time if the first was damaged."""
    for _ in range(2):
        if path.is_file() and path.stat().st_size > entry["bytes"]:
            path.unlink()
        object_store.download(url, path, entry["bytes"], on_progress)
        if entry_of(path) == entry:
            fsync_path(path)
            return
        path.unlink()
    raise CheckpointError(f"{redact_text(url)}: damaged, its contents are not what {MANIFEST} says")


def fetch_model(url: str, step: str, trust_pickle: bool) -> tuple[Path, str]:
    """Bring the model of a source in a store into the cache. Processes of one machine wait for each other.

    Args:
        url: An HF directory, or a run directory as `upload_checkpoint` makes it.
        step: Which checkpoint of a run: a step number, or "latest".
        trust_pickle: Whether weights in a pickle are wanted.

    Returns:
        The directory, and the step in it.

    Raises:
        UserError: There is no such model.
        StoreError: The store does not answer.
    """
    if url.startswith("file://"):
        return Path(url.removeprefix("file://")), step
    there = object_store.list_files(url)
    if "config.json" in there:
        return remote_directory(url, trust_pickle), step
    shown = redact_text(url)
    if "config.yaml" not in there:
        raise UserError(f"source={shown}: neither an HF directory (config.json) nor a run (config.yaml)")
    found = dict(complete_steps(url))
    number = next(iter(found), None) if step == "latest" else int(step) if step.isdecimal() else None
    if number not in found:
        steps = ", ".join(map(str, found)) or "none"
        raise UserError(f"source={shown}, step={step}: no such complete checkpoint; complete steps: {steps}")
    assert number is not None
    directory, manifest = object_store.cached_directory("runs", url), found[number]
    with file_lock(directory / ".lock"):
        atomic_write_text(directory / "config.yaml", object_store.read(join(url, "config.yaml")).decode())
        (directory / "tokenizer").mkdir(exist_ok=True)
        for name in object_store.list_files(join(url, "tokenizer")):
            content = object_store.read(join(url, "tokenizer", name))
            atomic_write_text(directory / "tokenizer" / name, content.decode())
        path = checkpoint_path(directory, number)
        if not is_complete(path) or (path / MANIFEST).read_bytes() != manifest:
            shutil.rmtree(path, ignore_errors=True)
            download_checkpoint(url, number, manifest, directory)
    return directory, str(number)


def retire(url: str, keep: int, keep_every: int) -> None:
    """Delete the checkpoints of the store that retention no longer keeps, the manifest of each first."""
    steps = [step for step, _ in complete_steps(url)] if keep else []
    for step in superseded_steps(steps, keep, keep_every):
        target = remote_checkpoint(url, step)
        names = sorted(object_store.list_files(target), key=lambda name: name != MANIFEST)
        object_store.delete(join(target, name) for name in names)


def _is_whole(files: dict[str, dict[str, Any]], there: dict[str, int]) -> bool:
    return all(there.get(name) == entry["bytes"] for name, entry in files.items())
