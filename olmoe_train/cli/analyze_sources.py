"""The models and the data of `olmoe analyze`: whether all of them fit together."""

from pathlib import Path

from tokenizers import Tokenizer

from olmoe_train.checkpoint.convert.stored_model import StoredModel
from olmoe_train.cli.model_sources import check_data
from olmoe_train.config.data import DataConfig
from olmoe_train.config.verbs import AnalyzeConfig
from olmoe_train.data.manifest import TOKENIZER
from olmoe_train.data.mixture import mixture_components, read_manifests
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.reporting.analysis_record import Decode
from olmoe_train.utils.errors import UserError

MOST_TOKENS = 2**31 - 1
"""Greatest count of an occurrence of a token id at an expert, int32."""


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
        if stored.config.routing == "expert_choice":
            errors.append(
                f"source={name}: has model.routing=expert_choice, and the analyses are of the experts that "
                "tokens choose"
            )
        for field in ("num_hidden_layers", "num_experts", "num_experts_per_tok"):
            mine, theirs = getattr(stored.config, field), getattr(first.config, field)
            if mine != theirs:
                errors.append(
                    f"source={name}: has {field}={mine}, and {first_name} has {theirs}; only models of one "
                    "architecture are compared"
                )
        try:
            check_data(stored.config, manifest, cfg.data)
        except UserError as error:
            errors.append(f"source={name}: {error}")
        errors += tokenizer_errors(name, stored.tokenizer, cfg.data)
    return errors


def count_errors(validation_tokens: int, cfg: AnalyzeConfig) -> list[str]:
    """Whether there are more tokens than the counts by token id can hold."""
    if cfg.max_sequences is not None:
        longest = cfg.max_sequences * cfg.data.sequence_length * len(mixture_components(cfg.data))
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
