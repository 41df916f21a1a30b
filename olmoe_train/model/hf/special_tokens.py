"""End-of-text and padding tokens: what a model's configuration, its tokenizer files and its
generation_config.json say of them."""

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
    """Where eos or pad of the configuration is not the token that the tokenizer files name; a message each.

    What either side leaves open is no contradiction.
    """
    errors = []
    for kind, (text, number) in special_tokens(tokenizer).items():
        stated = getattr(config, f"{kind}_token_id")
        if stated is not None and number not in (stated if isinstance(stated, list) else [stated]):
            errors.append(
                f"{kind}_token_id={stated}: the tokenizer in {tokenizer} says {kind}_token is {text!r}, "
                f"which is token {number}"
            )
    return errors


def special_tokens(directory: Path) -> dict[str, tuple[str, int]]:
    """ "eos" and "pad" -> (text, id), as far as the tokenizer files of a directory name them."""
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
        text = text["content"] if isinstance(text, dict) else text  # older libraries write an object
        if isinstance(text, str) and text in vocabulary:
            found[kind] = (text, vocabulary[text])
    return found


def copy_tokenizer(source: Path | None, directory: Path) -> None:
    """The tokenizer files of a directory into another one; of a lone tokenizer.json, that."""
    if source is None:
        return
    for path in [source / name for name in TOKENIZER_FILES] if source.is_dir() else [source]:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """generation_config.json of a directory, None where there is none."""
    return _read_json(directory / _GENERATION) or None


def write_generation_config(directory: Path, values: dict[str, Any]) -> None:
    write_json(directory / _GENERATION, values)


def generation_defaults(config: OlmoeConfig) -> dict[str, Any]:
    """The generation_config.json of a model that came without one."""
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {name: value for name, value in ids.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no file."""
    return read_json_object(path) if path.is_file() else {}
