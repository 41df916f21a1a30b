"""Checks of evaluation.sets, and of evaluation.prompts: the layout, and the prompts' lengths in tokens."""

import re
from pathlib import Path

from olmoe_train.config.choices import Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.train import EvaluationSet, TrainConfig
from olmoe_train.data.manifest import MANIFEST, Manifest, read_manifest
from olmoe_train.data.mixture import VALIDATION, mixture_components
from olmoe_train.data.remote import local_directory
from olmoe_train.data.tokenizer import check_vocabulary, load_tokenizer
from olmoe_train.data.tokens import verify_hashes
from olmoe_train.utils.errors import UserError


def sampling_errors(cfg: TrainConfig) -> list[str]:
    """What keeps a run from continuing evaluation.prompts, one message per error."""
    evaluation = cfg.evaluation
    if not evaluation.prompts:
        return []
    if cfg.parallel.strategy is Strategy.deepspeed:
        return [
            (
                f"evaluation.prompts: has {len(evaluation.prompts)} prompts to continue, and with "
                "parallel.strategy=deepspeed the engine has only training passes; set parallel.strategy="
                "fsdp, or evaluation.prompts=[]"
            )
        ]
    directory = mixture_components(cfg.data)[0].directory / "tokenizer"
    try:
        tokenizer = load_tokenizer(directory)
    except UserError as error:
        return [f"evaluation.prompts: {error}"]
    errors, longest = [], cfg.model.max_position_embeddings
    for index, prompt in enumerate(evaluation.prompts):
        key, ids = f"evaluation.prompts[{index}]", tokenizer.encode(prompt).ids
        if not ids:
            errors.append(f"{key}: is empty; give some text to continue")
            continue
        try:
            check_vocabulary(ids, cfg.model.vocab_size, directory)
        except UserError as error:
            errors.append(f"{key}: {error}")
        if len(ids) + evaluation.sample_tokens > longest:
            errors.append(
                f"{key}: the prompt ({len(ids)} tokens) and evaluation.sample_tokens="
                f"{evaluation.sample_tokens} together exceed model.max_position_embeddings={longest}; "
                "shorten the prompt, or lower evaluation.sample_tokens"
            )
    return errors


def set_errors(sets: list[EvaluationSet], data: DataConfig, manifests: dict[str, Manifest]) -> list[str]:
    """What keeps evaluation.sets from being evaluated, one message per error.

    Args:
        sets: The sets.
        data: The data of the run or of the command. Its tokenizer must have made the sets.
        manifests: Those of the data, by the name of their source. Empty: the data has errors of its own.
    """
    errors = _name_errors([one.name for one in sets], {VALIDATION, *manifests})
    for index, one in enumerate(sets):
        key = f"evaluation.sets[{index}].dir={one.dir}"
        try:
            errors += [
                f"{key}: {error}"
                for error in _data_errors(local_directory(data, one.dir), data, [*manifests.values()])
            ]
        except UserError as error:
            errors.append(f"{key}: {error}")
    return errors


def _name_errors(names: list[str], taken: set[str]) -> list[str]:
    errors = []
    for index, name in enumerate(names):
        key = f"evaluation.sets[{index}].name={name}"
        if not re.fullmatch(r"[\w.-]+", name):
            errors.append(
                f"{key}: may have only letters, digits and the characters _ . -, because it is part of the "
                "name of metrics"
            )
        elif name in taken:
            errors.append(f"{key}: is the name of a validation split of data.dir; choose another name")
        elif name in names[:index]:
            errors.append(
                f"{key}: is the name of evaluation.sets[{names.index(name)}], too; give each set its own name"
            )
    return errors


def _data_errors(directory: Path, data: DataConfig, manifests: list[Manifest]) -> list[str]:
    """What is wrong with the directory of a set. manifests: those of the data."""
    if not (directory / MANIFEST).is_file():
        relative = "" if directory.is_absolute() else f" in {Path.cwd()}"
        return [f"there is no prepared data{relative}; give a directory that `olmoe prepare` wrote"]
    mine = read_manifest(directory)
    if data.verify_hashes:
        verify_hashes(directory)
    errors = []
    if mine.preferences is not None:
        errors.append("holds preferences, and a set is evaluated as text; give prepared texts")
    if mine.validation.tokens == 0:
        errors.append(
            "its validation split is empty; prepare the data again with data.source.validation_fraction "
            "above 0, or with data.source.validation_paths"
        )
    for theirs in manifests[:1]:
        same = (mine.tokenizer_sha256, mine.eos_token_id) == (theirs.tokenizer_sha256, theirs.eos_token_id)
        if not same:
            tokenizer = mixture_components(data)[0].directory / "tokenizer"
            errors.append(
                f"was prepared with another tokenizer than data.dir={data.dir}; prepare the set with "
                f"tokenizer.path={tokenizer}"
            )
    return errors
