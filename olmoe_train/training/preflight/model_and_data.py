"""Checks of the model, its initial weights, and the training data."""

import math
from pathlib import Path

from olmoe_train.checkpoint.convert.stored_model import tokenizer_directory
from olmoe_train.config.aliases import ALIASES
from olmoe_train.config.initial_model import initial_directory
from olmoe_train.config.keys import documented_keys
from olmoe_train.config.model import olmoe_config
from olmoe_train.config.train import TrainConfig
from olmoe_train.data.manifest import TOKENIZER, Manifest
from olmoe_train.data.mixture import mixture_components, read_manifests, verify
from olmoe_train.data.source_errors import mixture_errors
from olmoe_train.model.hf.special_tokens import base_vocabulary, special_token_errors
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import is_remote


def model_errors(cfg: TrainConfig) -> list[str]:
    """What is wrong with the model and its initial weights, one message per error."""
    errors: list[str] = []
    try:
        olmoe_config(cfg.model)
    except UserError as error:
        errors += [f"model: {line.removeprefix('- ')}" for line in str(error).splitlines()]
    if cfg.data.sequence_length > cfg.model.max_position_embeddings:
        errors.append(
            f"data.sequence_length={cfg.data.sequence_length}: is longer than model.max_position_embeddings="
            f"{cfg.model.max_position_embeddings}{_origin(cfg)}; lower data.sequence_length or "
            + ("raise the other" if cfg.model.init_from is None else "raise max_position_embeddings there")
        )
    init_from = cfg.model.init_from
    if init_from is not None:
        errors += _init_from_errors(cfg, init_from, check_tokens=not errors)
    if cfg.checkpoint.resume not in ("auto", "never") and not is_remote(cfg.checkpoint.resume):
        errors += _resume_errors(Path(cfg.checkpoint.resume))
    return errors + _allowed_changes_errors(cfg.checkpoint.allow_changes)


def _allowed_changes_errors(keys: list[str]) -> list[str]:
    if not keys:
        return []  # reading all keys from the source takes milliseconds, and a plan checks many layouts
    known = {key for key, _, _ in documented_keys(TrainConfig)}
    known |= set(ALIASES)
    known |= {key.split(".")[0] for key in known}
    return [
        f"checkpoint.allow_changes=[{key}]: there is no such key or section; --help lists every key"
        for key in keys
        if key not in known
    ]


def _origin(cfg: TrainConfig) -> str:
    """Where the architecture comes from, if it is not given by keys."""
    init_from = cfg.model.init_from
    return f" (from the configuration of model.init_from={init_from})" if init_from else ""


def _init_from_errors(cfg: TrainConfig, init_from: str, check_tokens: bool) -> list[str]:
    try:
        tokenizer = tokenizer_directory(initial_directory(init_from, cfg.model.revision))
    except UserError as error:
        reason = str(error)
        for key in ("source", "model.init_from"):
            reason = reason.removeprefix(f"{key}={init_from}: ")
        return [f"model.init_from={init_from}: {reason}"]
    return _special_token_errors(cfg, tokenizer) if check_tokens else []


def _resume_errors(resume: Path) -> list[str]:
    if not resume.is_dir():
        return [f"checkpoint.resume={resume}: must be auto, never, or an existing checkpoint directory"]
    if any(resume.glob("*_optim_states.pt")) or any(resume.glob("global_step*")):
        return [
            (
                f"checkpoint.resume={resume}: this is DeepSpeed's own checkpoint format, whose pickles can "
                "run code when they are loaded; if you trust it, convert it to an HF directory (its "
                "zero_to_fp32.py with --safe_serialization, and a config.json), and set model.init_from to "
                "that directory"
            )
        ]
    return []


def _special_token_errors(cfg: TrainConfig, tokenizer: Path) -> list[str]:
    try:
        return [f"model.{error}" for error in special_token_errors(olmoe_config(cfg.model), tokenizer)]
    except UserError as error:
        return [str(error)]


def data_errors(cfg: TrainConfig, check_tokens: bool) -> tuple[list[str], dict[str, Manifest]]:
    """Check that the prepared data exists and that the model is for its tokenizer.

    Args:
        cfg: The config of the run.
        check_tokens: Whether to compare the model's special tokens with the tokenizer's, too. This needs a
            valid model.

    Returns:
        One message per error, and the manifests of the data by the name of their source. There are no
        manifests if they cannot be read.
    """
    errors = mixture_errors(cfg.data)
    if (
        not errors
        and cfg.trainer.max_epochs is not None
        and any(part.weight is not None for part in cfg.data.mixture)
    ):
        errors.append(
            f"trainer.max_epochs={cfg.trainer.max_epochs}: a mixture by weight has no end; give its sources "
            "token budgets (tokens instead of weight), or set trainer.max_steps or trainer.max_tokens"
        )
    if errors:
        return errors, {}
    try:
        manifests = read_manifests(cfg.data)
        verify(cfg.data)
    except UserError as error:
        return [str(error)], {}
    manifest = next(iter(manifests.values()))  # all of them have the same tokenizer
    init_from = cfg.model.init_from
    prepare = f"prepare the data with the model's own tokenizer: olmoe prepare tokenizer.path={init_from}"
    if manifest.vocab_size > cfg.model.vocab_size:
        size = math.ceil(manifest.vocab_size / 64) * 64
        errors.append(
            f"model.vocab_size={cfg.model.vocab_size}{_origin(cfg)}: the data in data.dir={cfg.data.dir} has "
            f"token ids up to {manifest.vocab_size - 1}; "
            + (prepare if init_from else f"set model.vocab_size={size} or prepare the data again")
        )
    if cfg.model.eos_token_id != manifest.eos_token_id:
        errors.append(
            f"model.eos_token_id={cfg.model.eos_token_id}{_origin(cfg)}: documents in data.dir="
            f"{cfg.data.dir} end with token {manifest.eos_token_id}; "
            + (prepare if init_from else f"set model.eos_token_id={manifest.eos_token_id}")
        )
    elif init_from is not None and (differs := _other_vocabulary(cfg, init_from)):
        errors.append(f"model.init_from={init_from}: {differs}; {prepare}")
    elif check_tokens:
        # Exports carry this tokenizer, and the embedding of the padding token is not trained.
        errors += _special_token_errors(cfg, mixture_components(cfg.data)[0].directory / "tokenizer")
    return errors, manifests


def _other_vocabulary(cfg: TrainConfig, init_from: str) -> str | None:
    """How the ids of the data's tokenizer differ from those of the model's. None: they do not, or one of the
    two has no tokenizer.

    Tokens that were added to a vocabulary, such as the roles of a chat, may have been renamed, and more may
    have been added.
    """
    try:
        of_model = base_vocabulary(tokenizer_directory(initial_directory(init_from, cfg.model.revision)))
        of_data = base_vocabulary(mixture_components(cfg.data)[0].directory / TOKENIZER)
    except UserError:
        return None  # reported elsewhere
    if not of_model or not of_data or of_model == of_data:
        return None
    texts = {number: text for text, number in of_model.items()}
    other = [(number, text) for text, number in of_data.items() if texts.get(number, text) != text]
    if not other:
        return None
    number, text = min(other)
    example = f"{number}, which is {text!r} in the data and {texts[number]!r} in the model"
    return (
        f"the data in data.dir={cfg.data.dir} has another tokenizer than this model: {len(other):,} ids mean "
        f"other tokens, for example {example}"
    )
