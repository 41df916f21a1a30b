"""The tokenizer of prepared data: trained here, or taken from a tokenizer.json or an HF directory."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from olmoe_train.errors import UserError

EOS = "<|endoftext|>"
PAD = "<|padding|>"
SMALLEST_VOCABULARY = 2 + 256  # the two special tokens and the bytes

# What else a Hugging Face directory may hold of a tokenizer; it goes along into exports.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@dataclass(frozen=True)
class TokenizerFiles:
    files: dict[str, bytes]
    """Name in the tokenizer directory -> contents; tokenizer.json always."""
    eos_token_id: int
    pad_token_id: int | None
    vocab_size: int
    """Largest token id plus one."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def save(self, directory: Path) -> None:
        directory.mkdir()
        for name, contents in self.files.items():
            (directory / name).write_bytes(contents)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> TokenizerFiles:
    """A byte-level BPE, eos 0 and pad 1. Split as GPT-2 does, not normalised: decoding gives the text back.

    The same texts give the same tokenizer, whatever the number of threads: the alphabet is fixed and sorted,
    and ties between equally frequent pairs go to the pair of lower ids. It is smaller than vocab_size when
    the texts have too few pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],  # ids follow this order
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"eos_token": EOS, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2**31 - 1,  # no limit of its own: what is long for a model is its config's to say
    }
    return _describe(
        {
            "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            "special_tokens_map.json": json.dumps(special, indent=2).encode(),
        },
        "the trained tokenizer",
    )


def read_tokenizer(path: str | Path) -> TokenizerFiles:
    """The tokenizer of an HF directory, or of a lone tokenizer.json, whose eos must then be <|endoftext|>.

    UserError if there is none, it is unreadable, or it has no end-of-text token.
    """
    path = Path(path).expanduser()
    main = path / "tokenizer.json" if path.is_dir() else path
    if not main.is_file():
        raise UserError(
            f"tokenizer.path={path}: no tokenizer.json there.\n"
            "  Give a tokenizer.json, a Hugging Face directory that has one, or null to train a tokenizer."
        )
    files = {"tokenizer.json": main.read_bytes()}
    if path.is_dir():
        files |= {name: (path / name).read_bytes() for name in _COMPANIONS if (path / name).is_file()}
    return _describe(files, f"tokenizer.path={path}")


def _describe(files: dict[str, bytes], origin: str) -> TokenizerFiles:
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config |= json.loads(files.get(name, b"{}"))
    except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot parse
        raise UserError(f"{origin}: not a readable tokenizer: {error}") from error
    eos = tokenizer.token_to_id(_token_text(config.get("eos_token")) or EOS)
    if eos is None:
        raise UserError(
            f"{origin}: no token to end documents with: tokenizer_config.json names no eos_token of the "
            f"vocabulary, and {EOS} is not in it.\n  Name one as eos_token there."
        )
    pad = tokenizer.token_to_id(_token_text(config.get("pad_token")) or PAD)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return TokenizerFiles(files, eos, pad, largest + 1)


def _token_text(entry: str | dict[str, Any] | None) -> str | None:
    """Special tokens are written as text, or as {"content": text, ...} by older libraries."""
    return entry["content"] if isinstance(entry, dict) else entry


def load_for_encoding(path: Path) -> Tokenizer:
    """The tokenizer as documents need it: nothing cut off, and `<|endoftext|>` in a text is just text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
