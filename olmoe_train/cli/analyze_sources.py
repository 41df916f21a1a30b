"""The models and the data of `olmoe analyze`: what `source=` names, and whether all of them fit together."""

import os
from pathlib import Path

from tokenizers import Tokenizer

from olmoe_train.checkpoint.convert.stored_model import StoredModel, open_stored_model, split_step
from olmoe_train.checkpoint.directory import complete_checkpoints, step_of
from olmoe_train.cli.evaluate import check_data
from olmoe_train.config.choices import StripPrefix
from olmoe_train.config.data import DataConfig
from olmoe_train.config.verbs import AnalyzeConfig
from olmoe_train.data.manifest import TOKENIZER
from olmoe_train.data.mixture import mixture_components, read_manifests
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.distributed.collectives import gather_from_all
from olmoe_train.model.hf.hub import PICKLE_FILES, SMALL_FILES, WEIGHT_FILES, hub_snapshot, is_hub_name
from olmoe_train.reporting.analysis_record import Decode
from olmoe_train.utils.errors import UserError

ALL_STEPS = "all"
MOST_TOKENS = 2**31 - 1
"""Greatest count of an occurrence of a token id at an expert, int32."""


def names_of_sources(source: list[str]) -> list[str]:
    """List the models that `source` names, with RUN@all replaced by the run's checkpoints.

    Raises:
        UserError: It names no model.
    """
    if not source:
        raise UserError("source=[] names no model: give a model, or a list of models such as [RUN@1000,RUN]")
    names = []
    for one in source:
        directory, step = split_step(one)
        if step != ALL_STEPS:
            names.append(one)
            continue
        steps = [step_of(path) for path in reversed(complete_checkpoints(Path(directory).expanduser()))]
        if not steps:
            raise UserError(f"source={one}: {directory} has no complete checkpoint")
        names += [f"{directory}@{step}" for step in steps]
    return names


def name_with_reference(names: list[str], reference: str | None) -> tuple[list[str], int]:
    """Add the reference to the models, if it is not among them.

    Returns:
        (the models, index of the reference; without one, the last model is the reference).

    Raises:
        UserError: A model is named twice.
    """
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"source: {', '.join(repeated)} is there twice")
    if reference is None:
        return names, len(names) - 1
    every = names if reference in names else [*names, reference]
    return every, every.index(reference)


def open_source(name: str, cfg: AnalyzeConfig) -> StoredModel:
    """Open one model. Collective: the first rank of a node downloads what is on the hub.

    Raises:
        UserError: There is no such model.
    """
    directory, step = split_step(name)
    if is_hub_name(directory):
        directory, step = str(download(directory, step, cfg.trust_pickle)), None
    strip_prefix = cfg.strip_prefix is StripPrefix.auto
    return open_stored_model(directory, step or "latest", cfg.trust_pickle, strip_prefix)


def download(name: str, revision: str | None, trust_pickle: bool) -> Path:
    """Bring a model from the hub into the cache of each node, and return its directory; collective."""
    files = SMALL_FILES + WEIGHT_FILES + (PICKLE_FILES if trust_pickle else ())

    def snapshot(is_first: bool) -> Path | None:
        if (os.environ.get("LOCAL_RANK", "0") == "0") is not is_first:
            return None
        return hub_snapshot(name, revision, files, download=is_first, key="source")

    first = gather_from_all(lambda: snapshot(True))
    others = gather_from_all(lambda: snapshot(False))
    found = {path.name for path in (*first, *others) if path is not None}
    if len(found) > 1:
        raise UserError(f"source={name}: ranks found different commits of it, {', '.join(sorted(found))}")
    mine = snapshot(True) or snapshot(False)
    assert mine is not None
    return mine


def model_and_data_errors(sources: dict[str, StoredModel], cfg: AnalyzeConfig) -> list[str]:
    """What does not fit together among the models and the data, one message per error.

    Args:
        sources: The models by name.
        cfg: The options.
    """
    manifests = read_manifests(cfg.data)
    manifest = next(iter(manifests.values()))
    if manifest.preferences is not None:
        return [f"data.dir={cfg.data.dir}: holds preferences; give prepared texts"]
    errors = count_errors(sum(one.validation.tokens for one in manifests.values()), cfg)
    (first_name, first), *_ = sources.items()
    for name, stored in sources.items():
        if stored.config.num_experts == 1:
            errors.append(f"source={name}: is a dense model, which has no router")
        for field in ("num_hidden_layers", "num_experts", "num_experts_per_tok"):
            mine, theirs = getattr(stored.config, field), getattr(first.config, field)
            if mine != theirs:
                errors.append(
                    f"source={name}: has {field}={mine}, and {first_name} has {theirs}; only models of one "
                    "architecture are compared"
                )
        try:
            check_data(stored.config, manifest, cfg)
        except UserError as error:
            errors.append(f"source={name}: {error}")
        errors += tokenizer_errors(name, stored.tokenizer, cfg.data)
    return errors


def count_errors(validation_tokens: int, cfg: AnalyzeConfig) -> list[str]:
    """Whether there are more tokens than the counts by token id can hold."""
    if cfg.max_sequences is not None:
        longest = cfg.max_sequences * cfg.data.sequence_length * max(1, len(cfg.data.mixture))
        validation_tokens = min(validation_tokens, longest)
    if not cfg.vocabulary or validation_tokens <= MOST_TOKENS:
        return []
    error = (
        f"data.dir={cfg.data.dir}: has {validation_tokens:,} validation tokens to analyze, and the "
        f"vocabulary is analyzed on at most {MOST_TOKENS:,}; lower max_sequences, or set vocabulary=false"
    )
    return [error]


def tokenizer_errors(name: str, directory: Path, data: DataConfig) -> list[str]:
    """Whether the tokenizer of a model has another vocabulary than that of the data."""
    theirs = mixture_components(data)[0].directory / TOKENIZER
    files = directory / "tokenizer.json", theirs / "tokenizer.json"
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return []
    of_model, of_data = (load_tokenizer(file.parent).get_vocab() for file in files)
    differing = [token for token, number in of_data.items() if of_model.get(token) != number]
    if not differing:
        return []
    token = min(differing, key=lambda one: of_data[one])
    error = (
        f"source={name}: its tokenizer is not that of data.dir={data.dir}: token {token!r} is "
        f"{of_data[token]} in the data and {of_model.get(token, 'missing')} in the model; prepare the data "
        f"with tokenizer.path={directory}"
    )
    return [error]


def data_tokenizer(data: DataConfig) -> Decode:
    """Make texts of token ids with the tokenizer of the data. Without a readable one, there are no texts."""
    try:
        tokenizer = load_tokenizer(mixture_components(data)[0].directory / TOKENIZER)
    except UserError:
        return lambda token: None
    return lambda token: text_of(tokenizer, token)


def text_of(tokenizer: Tokenizer, token: int) -> str | None:
    """The text of a token id; of a part of a character, the tokenizer's own spelling."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return tokenizer.id_to_token(token) if not text or "\ufffd" in text else text
