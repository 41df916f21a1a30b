"""The tokenizer of prepared data: trained on the corpus, or read from a file, a directory or the hub."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from olmoe_train.config.data import TokenizerConfig
from olmoe_train.data.chat_template import ChatTemplate, open_template, read_template
from olmoe_train.model.hf.special_tokens import TOKENIZER_FILES
from olmoe_train.utils.errors import UserError

EOS = "<|endoftext|>"
PAD = "<|padding|>"
SMALLEST_VOCABULARY = 2 + 256  # the two special tokens and one token per byte value
CHAT_TEMPLATE = "chat_template.jinja"
# Transformers uses this template, by its name, for conversations with tools.
_TOOL_USE = "tool_use"
_TOOL_USE_TEMPLATE = f"additional_chat_templates/{_TOOL_USE}.jinja"
_FILES = (*TOKENIZER_FILES, _TOOL_USE_TEMPLATE)

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The names that chat templates and Transformers use for special tokens.
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as the files that describe it, with what this program needs to know about it.

    `sha256` identifies it: the hash of tokenizer.json, hexadecimal.
    """

    files: dict[str, bytes]
    """Name in the tokenizer directory -> contents. It always has tokenizer.json."""
    eos_token_id: int
    pad_token_id: int | None
    vocab_size: int
    """Largest token id plus one."""
    special_tokens: dict[str, str]
    """Name ("eos_token", ...) -> text of each special token, the variables that chat templates get."""

    @property
    def chat_template(self) -> str | None:
        """The template in chat_template.jinja, else that in tokenizer_config.json (of several, "default")."""
        return self._templates().get("default")

    @property
    def tool_use_template(self) -> str | None:
        """The template for conversations with tools. None: they have none of their own."""
        return self._templates().get(_TOOL_USE)

    def _templates(self) -> dict[str, str]:
        files = {"default": CHAT_TEMPLATE, _TOOL_USE: _TOOL_USE_TEMPLATE}
        found = {name: self.files[path].decode("utf-8") for name, path in files.items() if path in self.files}
        if found:  # Transformers ignores the configuration then
            return found
        template = json.loads(self.files.get("tokenizer_config.json", b"{}")).get("chat_template")
        if isinstance(template, list):
            return {entry["name"]: entry["template"] for entry in template}
        return {} if template is None else {"default": template}

    def with_chat_template(self, template: str | None) -> "TokenizerFiles":
        """Return a copy with this chat template only. None: return the same tokenizer."""
        if template is None:
            return self
        files = {name: content for name, content in self.files.items() if name != _TOOL_USE_TEMPLATE}
        return replace(self, files={**files, CHAT_TEMPLATE: template.encode()})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the files into a new directory."""
        directory.mkdir()
        for name, contents in self.files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(contents)


def tokenizer_from_config(cfg: TokenizerConfig) -> TokenizerFiles | None:
    """Read the tokenizer that tokenizer.path names, with the chat template that the configuration asks for.

    Returns:
        The tokenizer. None if tokenizer.path is null, so that one has to be trained.

    Raises:
        UserError: There is no usable tokenizer or template.
    """
    if cfg.path is None:
        return None
    return read_tokenizer_files(cfg.path, cfg.revision).with_chat_template(template_from_config(cfg))


def template_from_config(cfg: TokenizerConfig) -> str | None:
    """Read the source of tokenizer.chat_template. None if the key is null. UserError if it is not found."""
    return None if cfg.chat_template is None else read_template(cfg.chat_template)


def chat_template_from_config(cfg: TokenizerConfig, tokenizer: TokenizerFiles | None) -> ChatTemplate:
    """Build the template that renders conversations.

    Args:
        cfg: The `tokenizer` section.
        tokenizer: What `tokenizer_from_config` returned for it.

    Raises:
        UserError: Neither the configuration nor the tokenizer has a template, or it is not usable.
    """
    source = tokenizer.chat_template if tokenizer else template_from_config(cfg)
    if source is None:
        raise UserError(
            f"data.source.records: the tokenizer (tokenizer.path={cfg.path}) has no chat template.\n"
            "  Name one (tokenizer.chat_template=tulu) or give a file (tokenizer.chat_template=FILE.jinja)."
        )
    if cfg.chat_template:
        origin = f"tokenizer.chat_template={cfg.chat_template}"
    else:
        origin = f"the chat template of tokenizer.path={cfg.path}"
    special = tokenizer.special_tokens if tokenizer else {"eos_token": EOS, "pad_token": PAD}
    tool_use = tokenizer.tool_use_template if tokenizer else None
    kwargs = dict(cfg.chat_template_kwargs)
    return open_template(source, special, cfg.template_date, origin, tool_use, kwargs)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> TokenizerFiles:
    """Train a byte-level BPE with eos 0 and pad 1.

    Text is split as GPT-2 does and not normalized, so decoding returns the text unchanged. The same texts
    give the same tokenizer for any number of threads: the initial alphabet is fixed and sorted, and of
    equally frequent pairs the one with the lower ids is merged first.

    Args:
        texts: The training texts.
        vocab_size: Vocabulary size, special tokens included. If the texts have too few pairs to merge, the
            vocabulary is smaller.
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
        "model_max_length": 2**31 - 1,  # no limit: the longest input is a property of the model, not of this
    }
    return _describe(
        {
            "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            "special_tokens_map.json": json.dumps(special, indent=2).encode(),
        },
        "the trained tokenizer",
    )


def read_tokenizer_files(
    path: str | Path, revision: str | None = None, origin: str | None = None
) -> TokenizerFiles:
    """Read all files of a tokenizer, to encode a corpus with it and to copy it beside the tokens.

    Args:
        path: An HF directory, a single tokenizer.json, or a model's name on the Hugging Face hub. The eos
            of a single tokenizer.json must be <|endoftext|>, since no other file names it.
        revision: Branch, tag or commit on the hub. Only with a name on the hub.
        origin: What messages call the tokenizer. None: tokenizer.path=PATH.

    Raises:
        UserError: There is no tokenizer.json, it cannot be read, or it has no end-of-text token.
    """
    origin, name = origin or f"tokenizer.path={path}", str(path)
    path = Path(path).expanduser()
    if not path.exists() and _HUB_NAME.fullmatch(name):
        path = _download(name, revision)
    elif revision is not None:
        raise UserError(f"tokenizer.revision={revision}: has no effect, because {origin} is not on the hub")
    main = path / "tokenizer.json" if path.is_dir() else path
    if not main.is_file():
        raise UserError(
            f"{origin}: no tokenizer.json found.\n  Give a tokenizer.json, a Hugging Face directory that has "
            "one, a model's name on the hub, or null to train a tokenizer."
        )
    if main is path:
        return _describe({"tokenizer.json": main.read_bytes()}, origin)
    files = {name: (path / name).read_bytes() for name in _FILES if (path / name).is_file()}
    return _describe(files, origin)


def _download(name: str, revision: str | None) -> Path:
    """Return the directory in the Hugging Face cache with a model's tokenizer files, downloaded if needed."""
    from huggingface_hub import snapshot_download  # takes half a second to import, and is rarely needed

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # whatever the hub's client raises: no network, no such name, ...
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tokenizer.path={name}: no such file or directory here, and the Hugging Face hub did not "
            f"provide it: {reason}\n  Give a path, a model's name on the hub, or null to train a tokenizer. "
            "Without a network, a name works only if it has been downloaded before."
        ) from error


def _describe(files: dict[str, bytes], origin: str) -> TokenizerFiles:
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config |= json.loads(files.get(name, b"{}"))
    except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot parse
        raise UserError(f"{origin}: not a readable tokenizer: {error}") from error
    special = {name: text for name in _SPECIAL_TOKEN_NAMES if (text := _token_text(config.get(name)))}
    special.setdefault("eos_token", EOS)
    eos = tokenizer.token_to_id(special["eos_token"])
    if eos is None:
        raise UserError(
            f"{origin}: no token to end documents with: tokenizer_config.json names no eos_token that is in "
            f"the vocabulary, and neither is {EOS}.\n  Set eos_token in tokenizer_config.json."
        )
    pad = tokenizer.token_to_id(special.get("pad_token", PAD))
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return TokenizerFiles(files, eos, pad, largest + 1, special)


def _token_text(entry: str | dict[str, Any] | None) -> str | None:
    """Special tokens are stored as text, or by older libraries as {"content": text, ...}."""
    return entry["content"] if isinstance(entry, dict) else entry


def load_for_encoding(path: Path, plain_text: bool) -> Tokenizer:
    """Load a tokenizer.json for encoding a corpus, with truncation and padding off.

    Args:
        path: The tokenizer.json.
        plain_text: Encode the spelling of a special token, such as `<|endoftext|>`, as ordinary text.
            Documents need that. A rendered conversation does not: its special tokens are intended.
    """
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = plain_text
    return tokenizer


def check_vocabulary(ids: list[int], vocab_size: int, directory: Path) -> None:
    """Check that a model with `vocab_size` tokens has all of `ids`, which directory/tokenizer.json gave.

    Raises:
        UserError: The model lacks one.
    """
    if max(ids) >= vocab_size:
        raise UserError(
            f"{directory}/tokenizer.json gives token {max(ids)}, but the model has only {vocab_size} tokens: "
            "the tokenizer belongs to another model"
        )


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer.json of a model or run directory, to encode a prompt and decode its continuation.

    Truncation and padding, which the file may ask for, are off.

    Raises:
        UserError: The file is missing or unreadable.
    """
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing, but needed to encode text.\n  Copy the model's tokenizer.json there."
        ) from None
    except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot parse
        raise UserError(f"{path}: not a readable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
