"""Stored log-probabilities of the reference: `olmoe logprobs`, or the run before its first step, writes them.

A directory holds one little-endian fp64 file per column, with an entry per document in the order of the data,
and manifest.json with the hashes of the files, of the model and of the data. Files that belong to another
model or to other data are refused.

Shapes: D documents of all sources of a split.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from olmoe_train.checkpoint.convert.adapter_base import WeightHash
from olmoe_train.checkpoint.convert.stored_model import open_stored_model
from olmoe_train.config.adapter import AdapterConfig, adapter_spec, quantizes_base
from olmoe_train.config.choices import Precision, StripPrefix
from olmoe_train.config.initial_model import initial_directory
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import EvaluationConfig, TrainerConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.manifest import sample_files
from olmoe_train.distributed.collectives import on_rank_0
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.hf.directory import parameter_shapes
from olmoe_train.training.objectives.base import Heartbeat
from olmoe_train.training.objectives.log_probs import SplitLogProbs, split_log_probs
from olmoe_train.training.objectives.preference_data import (
    first_epochs,
    validation_batches,
    validation_sources,
)
from olmoe_train.training.objectives.reference import CachedReference
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_directory, read_json_object, write_json

log = logging.getLogger(__name__)
FORMAT, VERSION, MANIFEST = "olmoe-train-logprobs", 1, "manifest.json"
COLUMNS = ("train", "train_mismatched", "validation", "validation_mismatched")
"""Names of the files, which end in .f64; the mismatched ones are there for kto only."""


@dataclass(frozen=True)
class Identity:
    """What stored log-probabilities depend on."""

    model: str
    """Hash of the weights, of the architecture, of the initial adapter and of trainer.precision."""
    data: str
    """Hash of the prepared data and of what is compared in it."""


def identity_of(
    model: OlmoeForCausalLM,
    cfg: ModelConfig,
    adapter: AdapterConfig,
    precision: Precision,
    seed: int,
    data: TrainingData,
) -> Identity:
    """The identity of the reference of a run; collective: rank 0 reads the weights of model.init_from.

    Args:
        model: The model with its initial weights.
        cfg: Where the weights come from.
        adapter: The adapter of the run.
        precision: Precision of the computation.
        seed: Seed of the weights, if they come from nowhere.
        data: The data of the run.
    """
    hashes: list[str] = [""]

    def hash_model() -> None:
        of_model = {
            "weights": _weights(cfg, seed, model),
            "architecture": model.config.to_dict(),
            "precision": precision.value,
            "adapter": _adapter(cfg, adapter),
        }
        hashes[0] = _hash(of_model)

    on_rank_0(hash_model)
    dist.broadcast_object_list(hashes)
    shards = [
        digest
        for manifest in data.manifests.values()
        for split in (manifest.train, manifest.validation)
        for shard in split.shards
        for _, digest in sample_files(shard)
    ]
    # Mismatched completions are cut at the sequence length.
    mismatched_length = data.cfg.sequence_length if data.form.single else None
    return Identity(hashes[0], _hash({"shards": shards, "mismatched length": mismatched_length}))


def _hash(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _weights(cfg: ModelConfig, seed: int, model: OlmoeForCausalLM) -> str:
    if cfg.init_from is None:
        return f"seed {seed}"
    if model.base is not None:
        return model.base.xxh3_128
    directory = initial_directory(cfg.init_from, cfg.revision)
    strip_prefix = cfg.strip_prefix is StripPrefix.auto
    stored = open_stored_model(directory, trust_pickle=cfg.trust_pickle, strip_prefix=strip_prefix)
    digest = WeightHash()
    for name in parameter_shapes(OlmoeForCausalLM, stored.config):
        digest.add(name, stored.read(name))
    return digest.hexdigest()


def _adapter(cfg: ModelConfig, adapter: AdapterConfig) -> dict[str, Any] | None:
    """What an adapter changes in the reference: a base in 4 bits, and the files of adapter_from."""
    if adapter_spec(adapter) is None:
        return None
    values: dict[str, Any] = {"quantized": quantizes_base(adapter)}
    if cfg.adapter_from is not None:
        directory = Path(cfg.adapter_from).expanduser()
        files = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".json"))
        values["files"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return values


def compute_log_probs(
    model: OlmoeForCausalLM,
    trainer: TrainerConfig,
    evaluation: EvaluationConfig,
    data: TrainingData,
    device: torch.device,
    with_heartbeat: Heartbeat = iter,
) -> dict[str, Tensor]:
    """Compute the log-probabilities of all documents, in the micro-batches of the run's first epoch.
    Collective.

    Args:
        model: The reference, whole or sharded.
        trainer: Batch sizes of the run.
        evaluation: Batch size of validation.
        data: The data of the run.
        device: The device of this rank.
        with_heartbeat: Wraps the batches, to report progress to the watchdog.

    Returns:
        Name out of COLUMNS -> fp64 [D] on the CPU.
    """
    train = [
        split_log_probs(model, with_heartbeat(batches), 0, documents, device)
        for documents, batches in first_epochs(data, trainer)
    ]
    validation = [
        split_log_probs(
            model,
            with_heartbeat(validation_batches(source, data, evaluation)),
            source.first_document,
            source.documents,
            device,
        )
        for source in validation_sources(data)
    ]
    columns = {"train": _joined(train), "validation": _joined(validation)}
    if data.form.single:
        columns |= {
            "train_mismatched": _joined(train, mismatched=True),
            "validation_mismatched": _joined(validation, mismatched=True),
        }
    return columns


def _joined(parts: list[SplitLogProbs], mismatched: bool = False) -> Tensor:
    columns = [part.mismatched_D if mismatched else part.sum_D for part in parts]
    found = [column_D for column_D in columns if column_D is not None]
    return torch.cat([torch.empty(0, dtype=torch.float64), *found])


def write_log_probs(directory: Path, columns: dict[str, Tensor], identity: Identity) -> None:
    """Write the columns; the directory appears complete or not at all. Collective: rank 0 writes.

    Raises:
        UserError: The directory exists, or cannot be written.
    """

    def write() -> None:
        manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "files": {}}
        manifest |= {"model": identity.model, "data": identity.data}
        try:
            with atomic_directory(directory) as partial:
                for name, column_D in columns.items():
                    raw = column_D.numpy().astype("<f8").tobytes()
                    (partial / f"{name}.f64").write_bytes(raw)
                    described = {"documents": len(column_D), "sha256": hashlib.sha256(raw).hexdigest()}
                    manifest["files"][name] = described
                write_json(partial / MANIFEST, manifest)
        except OSError as error:
            raise UserError(f"objective.logprobs_dir={directory}: cannot be written: {error}") from error

    on_rank_0(write)


def read_log_probs(directory: Path, identity: Identity, single: bool) -> dict[str, Tensor]:
    """Read what `write_log_probs` wrote.

    Args:
        directory: Where.
        identity: Of the reference and the data of this run.
        single: Whether mismatched completions are needed.

    Raises:
        UserError: The files are damaged, or belong to another model or other data, or have no mismatched
            completions.
    """
    manifest = read_json_object(directory / MANIFEST)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{directory / MANIFEST}: not a manifest of log-probabilities of this program")
    stale = [
        f"{what}: hash {manifest.get(what)} there, {now} in this run"
        for what, now in (("model", identity.model), ("data", identity.data))
        if manifest.get(what) != now
    ]
    if stale:
        what = f"{directory} holds log-probabilities of another reference or other data:"
        raise UserError(
            "\n    ".join([what, *stale])
            + "\n  Delete the directory, or give another one with objective.logprobs_dir; the run computes "
            "them again."
        )
    columns = {}
    for name, described in manifest["files"].items():
        path = directory / f"{name}.f64"
        raw = path.read_bytes() if name in COLUMNS and path.is_file() else b""
        if hashlib.sha256(raw).hexdigest() != described["sha256"] or len(raw) != 8 * described["documents"]:
            raise UserError(f"{path}: missing or damaged; delete {directory}, and the run computes it again")
        columns[name] = torch.from_numpy(np.frombuffer(raw, "<f8").astype(np.float64))
    if single and "train_mismatched" not in columns:
        raise UserError(
            f"{directory} has no log-probabilities of mismatched completions, which objective.kind=kto "
            "needs; give another directory with objective.logprobs_dir"
        )
    return columns


def cached_reference(
    model: OlmoeForCausalLM,
    identity: Identity,
    trainer: TrainerConfig,
    evaluation: EvaluationConfig,
    data: TrainingData,
    directory: Path,
    device: torch.device,
    with_heartbeat: Heartbeat = iter,
) -> CachedReference:
    """Read the stored log-probabilities, or compute and store them if there are none. Collective.

    Args:
        model: The reference: the model that is trained, with its initial weights.
        identity: Of the model and the data.
        trainer, evaluation, data, device, with_heartbeat: As for compute_log_probs.
        directory: Where they are stored.

    Raises:
        UserError: As read_log_probs and write_log_probs.
    """
    exists = [False]

    def look() -> None:
        exists[0] = (directory / MANIFEST).is_file()
        if not exists[0] and directory.is_dir() and any(directory.iterdir()):
            raise UserError(
                f"objective.logprobs_dir={directory}: has files and no {MANIFEST}; give another directory"
            )

    on_rank_0(look)
    dist.broadcast_object_list(exists)  # ranks may see a shared file system at different times
    if exists[0]:
        log.info("log-probabilities of the reference: read from %s", directory)
    else:
        log.info("log-probabilities of the reference: computing them once")
        columns = compute_log_probs(model, trainer, evaluation, data, device, with_heartbeat)
        write_log_probs(directory, columns, identity)
        log.info("log-probabilities of the reference: written to %s", directory)
    columns = read_log_probs(directory, identity, data.form.single)
    to_device = {name: columns[name].to(device) for name in columns if name.startswith("train")}
    return CachedReference(
        to_device["train"],
        to_device.get("train_mismatched"),
        columns["validation"],
        columns.get("validation_mismatched"),
    )
