"""The models that `source=` of `olmoe evaluate` and `olmoe analyze`, or `sources=` of `olmoe merge`, name."""

import os
from pathlib import Path

import torch.distributed as dist

from olmoe_train.checkpoint.convert.stored_model import StoredModel, open_stored_model, split_step
from olmoe_train.checkpoint.directory import complete_checkpoints, step_of
from olmoe_train.checkpoint.remote import complete_steps
from olmoe_train.config.choices import StripPrefix, Weights
from olmoe_train.config.data import DataConfig
from olmoe_train.data.manifest import Manifest
from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.hf.hub import PICKLE_FILES, SMALL_FILES, WEIGHT_FILES, hub_snapshot, is_hub_name
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import is_remote

ALL_STEPS = "all"


def names_of_sources(source: list[str], key: str = "source") -> list[str]:
    """List the models that `source` names, with RUN@all replaced by the run's checkpoints.

    Args:
        source: The names.
        key: The configuration key that has the names, for messages.

    Raises:
        UserError: It names no model.
    """
    if not source:
        raise UserError(f"{key}=[] names no model: give a model, or a list of models such as [RUN@1000,RUN]")
    names = []
    for one in source:
        directory, step = split_step(one)
        if step != ALL_STEPS:
            names.append(one)
            continue
        if is_remote(directory):
            steps = sorted(step for step, _ in complete_steps(directory))
        else:
            steps = [step_of(path) for path in reversed(complete_checkpoints(Path(directory).expanduser()))]
        if not steps:
            raise UserError(f"{key}={one}: {directory} has no complete checkpoint")
        names += [f"{directory}@{step}" for step in steps]
    return names


def open_source(
    name: str,
    trust_pickle: bool,
    strip_prefix: StripPrefix,
    key: str = "source",
    which: Weights = Weights.weights,
) -> StoredModel:
    """Open one model. Collective, if there are ranks: the first rank of a node downloads what is on the hub.

    Args:
        name: A path, RUN@STEP, or the name of a model on the hub, with or without @REVISION.
        trust_pickle: Accept weights in a pickle.
        strip_prefix: Whether to take the prefixes of wrappers off the names of the tensors.
        key: The configuration key that has the name, for messages about the hub.
        which: The weights of a run, or their average.

    Raises:
        UserError: There is no such model.
    """
    directory, step = split_step(name)
    if is_hub_name(directory):
        directory, step = str(download(directory, step, trust_pickle, key)), None
    strip = strip_prefix is StripPrefix.auto
    return open_stored_model(directory, step or "latest", trust_pickle, strip, which)


def download(name: str, revision: str | None, trust_pickle: bool, key: str) -> Path:
    """Bring a model from the hub into the cache of each node, and return its directory; collective, if there
    are ranks."""
    files = SMALL_FILES + WEIGHT_FILES + (PICKLE_FILES if trust_pickle else ())
    if not dist.is_initialized():
        return hub_snapshot(name, revision, files, key=key)

    def snapshot(is_first: bool) -> Path | None:
        if (os.environ.get("LOCAL_RANK", "0") == "0") is not is_first:
            return None
        return hub_snapshot(name, revision, files, download=is_first, key=key)

    first = gather_from_all(lambda: snapshot(True))
    others = gather_from_all(lambda: snapshot(False))
    found = {path.name for path in (*first, *others) if path is not None}
    if len(found) > 1:
        raise UserError(f"{key}={name}: ranks found different commits of it, {', '.join(sorted(found))}")
    mine = snapshot(True) or snapshot(False)
    assert mine is not None
    return mine


def check_data(config: OlmoeConfig, manifest: Manifest, data: DataConfig) -> None:
    """Check that prepared data fits a model.

    Args:
        config: Architecture of the model.
        manifest: Manifest of the data.
        data: Its directory and sequence length.

    Raises:
        UserError: The model cannot read the data, or the data was made by another tokenizer than the
            model's; the message lists all reasons.
    """
    errors = []
    if manifest.preferences is not None:
        errors.append(
            f"data.dir={data.dir} holds preferences, and this command computes the loss of texts: give "
            "other data; a run with objective=preference validates on preferences"
        )
    if manifest.vocab_size > config.vocab_size:
        errors.append(
            f"data.dir={data.dir} has token ids up to {manifest.vocab_size - 1}, but the model has only "
            f"{config.vocab_size} embeddings: prepare the data with the model's own tokenizer"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if manifest.eos_token_id not in ends:
        errors.append(
            f"data.dir={data.dir}: documents end with token {manifest.eos_token_id}, but the model's "
            f"eos_token_id is {config.eos_token_id}: the data was prepared with another tokenizer"
        )
    if data.sequence_length > config.max_position_embeddings:
        errors.append(
            f"data.sequence_length={data.sequence_length} is greater than the model's "
            f"max_position_embeddings={config.max_position_embeddings}: lower it"
        )
    if errors:
        raise UserError("\n  ".join(errors))
