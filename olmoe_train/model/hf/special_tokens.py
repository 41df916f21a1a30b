"""End-of-text (eos) and padding (pad) tokens, as a model's configuration, its tokenizer files and its
generation_config.json name them."""

import shutil
from pathlib import Path
from typing import Any

from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.utils.files import read_json_object, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_GENERATION = "generation_config.json"


def special_token_errors(config: OlmoeConfig, tokenizer: Path) -> list[str]:
    """Compare the configuration's eos and pad tokens with those that the tokenizer files name.

    Args:
        config: Configuration of the model.
        tokenizer: Directory of the tokenizer files.

    Returns:
        One message for each token that differs. A token that only one side names does not differ.
    """
    errors = []
    for kind, (text, number) in special_tokens(tokenizer).items():
        stated = getattr(config, f"{kind}_token_id")
        if stated is not None and number not in (stated if isinstance(stated, list) else [stated]):
            errors.append(
                f"{kind}_token_id={stated}, but the {kind}_token of the tokenizer in {tokenizer} is "
                f"{text!r}, which is token {number}"
            )
    return errors


def base_vocabulary(directory: Path) -> dict[str, int]:
    """The ids of a tokenizer's vocabulary by text, without added tokens; empty if there is none in the files
    of the directory."""
    tokenizer = _read_json(directory / "tokenizer.json")
    added = {token["id"] for token in tokenizer.get("added_tokens") or []}
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict):
        return {}
    return {text: number for text, number in vocabulary.items() if number not in added}


def special_tokens(directory: Path) -> dict[str, tuple[str, int]]:
    """The special tokens that the tokenizer files of a directory name.

    Returns:
        "eos" and "pad" -> (text, id). A token that the files do not name is left out.
    """
    tokenizer = _read_json(directory / "tokenizer.json")
    named = _read_json(directory / "special_tokens_map.json") | _read_json(
        directory / "tokenizer_config.json"
    )
    model = tokenizer.get("model") or {}
    vocabulary = dict(model["vocab"]) if isinstance(model.get("vocab"), dict) else {}
    vocabulary |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    found: dict[str, tuple[str, int]] = {}
    for kind in ("eos", "pad"):
        text = named.get(f"{kind}_token")
        text = text["content"] if isinstance(text, dict) else text  # older libraries wrote an object
        if isinstance(text, str) and text in vocabulary:
            found[kind] = (text, vocabulary[text])
    return found


def copy_tokenizer(source: Path | None, directory: Path) -> None:
    """Copy tokenizer files.

    Args:
        source: A directory, whose tokenizer files are copied, or a single file. None: nothing is copied.
        directory: The directory to copy to.
    """
    if source is None:
        return
    for path in [source / name for name in TOKENIZER_FILES] if source.is_dir() else [source]:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """Content of the generation_config.json of a directory. None: there is no such file."""
    return _read_json(directory / _GENERATION) or None


def write_generation_config(directory: Path, values: dict[str, Any]) -> None:
    """Write `values` as the generation_config.json of a directory."""
    write_json(directory / _GENERATION, values)


def generation_defaults(config: OlmoeConfig) -> dict[str, Any]:
    """Content of generation_config.json for a model that came without this file."""
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {name: value for name, value in ids.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    return read_json_object(path) if path.is_file() else {}
