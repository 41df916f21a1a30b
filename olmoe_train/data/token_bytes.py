"""UTF-8 bytes of each token id, for bits per byte.

Losses in nats per token of two tokenizers cannot be compared, because their tokens have different lengths.
Bits per byte can. The number of bytes of a token is exact for a byte-level BPE, in which every character of a
token stands for one byte.

Shapes: V vocabulary.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from olmoe_train.config.data import DataConfig
from olmoe_train.data.manifest import TOKENIZER, read_manifest
from olmoe_train.data.mixture import mixture_components
from olmoe_train.utils.errors import UserError

ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
"""The 256 characters that stand for the bytes."""
KEEPS_ALL_TEXT = ("ByteLevel", "Digits", "Split")
"""Pre-tokenizers that only cut the text. Split can also remove what it matches."""


def token_bytes_or_reason(data: DataConfig) -> tuple[Tensor | None, str | None]:
    """Count the bytes of each token of the tokenizer of prepared data.

    The normalizer NFC is accepted: it replaces characters by equivalent ones, and the bytes are those of the
    normalized text, which the model sees. Special tokens, end of text and padding have 0 bytes.

    Args:
        data: The prepared data, one directory or a mixture.

    Returns:
        (int64 [V] on the CPU, None); or, if the tokenizer does not say exactly how many bytes its tokens
        have, (None, the reason).
    """
    directory = mixture_components(data)[0].directory
    manifest = read_manifest(directory)
    if manifest.tokenizer_sha256 is None:
        return None, f"{directory} has no tokenizer"
    path = directory / TOKENIZER / "tokenizer.json"
    without_text = tuple({manifest.eos_token_id, manifest.padding})
    return _bytes_or_reason(path, manifest.tokenizer_sha256, manifest.vocab_size, without_text)


@lru_cache(maxsize=4)  # a run asks at every validation
def _bytes_or_reason(
    path: Path, _sha256: str, vocab_size: int, without_text: tuple[int, ...]
) -> tuple[Tensor | None, str | None]:
    try:
        return _of_file(path, vocab_size, without_text), None
    except UserError as error:
        return None, str(error)


def _of_file(path: Path, vocab_size: int, without_text: tuple[int, ...]) -> Tensor:
    content = json.loads(path.read_text(encoding="utf-8"))
    if (reason := _why_inexact(content)) is not None:
        raise UserError(f"{path}: {reason}")
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    ids = [vocab_size - 1, *added, *content["model"]["vocab"].values()]
    bytes_V = torch.zeros(max(ids) + 1, dtype=torch.int64)
    for text, number in content["model"]["vocab"].items():
        if number in added:
            continue
        if not ALPHABET.issuperset(text):
            raise UserError(f"{path}: token {number}, {text!r}, is not made of bytes")
        bytes_V[number] = len(text)
    for number, token in added.items():
        if token.get("special"):
            continue
        if token.get("lstrip") or token.get("rstrip"):
            raise UserError(
                f"{path}: token {number}, {token['content']!r}, takes any number of spaces beside it"
            )
        bytes_V[number] = len(token["content"].encode())
    bytes_V[list(without_text)] = 0
    return bytes_V


def _why_inexact(content: dict[str, Any]) -> str | None:
    """Why the tokens of a tokenizer.json do not spell the text byte by byte; None: they do."""
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, and only a byte-level BPE says how many bytes a token has"
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        return f"its normalizer {normalizer['type']} changes the text"
    before = content.get("pre_tokenizer") or {}
    parts = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    if not any(part.get("type") == "ByteLevel" for part in parts):
        return "its BPE is not byte-level"
    for part in parts:
        if part["type"] not in KEEPS_ALL_TEXT or part.get("behavior") == "Removed":
            return f"its pre-tokenizer {part['type']} changes the text"
        if part.get("add_prefix_space"):
            return "its pre-tokenizer adds a space before each document"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its tokens have marks that are not text"
    if missing := ALPHABET - model["vocab"].keys():
        return f"its vocabulary lacks {len(missing)} of the 256 bytes, which encoding would drop"
    return None
