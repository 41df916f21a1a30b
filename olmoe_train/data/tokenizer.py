"""The tokenizer of prepared data: trained here, or a tokenizer.json, an HF directory or one of the hub."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from olmoe_train.config.data import TokenizerConfig
from olmoe_train.data.chat_template import ChatTemplate, open_template
from olmoe_train.utils.errors import UserError

EOS = "<|endoftext|>"
PAD = "<|padding|>"
SMALLEST_VOCABULARY = 2 + 256  # the two special tokens and the bytes
CHAT_TEMPLATE = "chat_template.jinja"

# What else a Hugging Face directory may hold of a tokenizer; it goes along into exports.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The names under which templates and Transformers know special tokens.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    files: dict[str, bytes]
    """Name in the tokenizer directory -> contents; tokenizer.json always."""
    eos_token_id: int
    pad_token_id: int | None
    vocab_size: int
    """Largest token id plus one."""
    special_tokens: dict[str, str]
    """("eos_token", ...) -> its text, as chat templates are given them."""

    @property
    def chat_template(self) -> str | None:
        """Its own file's, else the one in tokenizer_config.json (where there are several, the default)."""
        if CHAT_TEMPLATE in self.files:
            return self.files[CHAT_TEMPLATE].decode("utf-8")
        template = json.loads(self.files.get("tokenizer_config.json", b"{}")).get("chat_template")
        if isinstance(template, list):
            return next((entry["template"] for entry in template if entry["name"] == "default"), None)
        return template

    def with_chat_template(self, template: str | None) -> "TokenizerFiles":
        """With another template in its files; None: as it is."""
        if template is None:
            return self
        return replace(self, files={**self.files, CHAT_TEMPLATE: template.encode()})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def save(self, directory: Path) -> None:
        directory.mkdir()
        for name, contents in self.files.items():
            (directory / name).write_bytes(contents)


def given_tokenizer(cfg: TokenizerConfig) -> TokenizerFiles | None:
    """The one that there is already, with the chat template that is asked for. None: one is to be trained."""
    if cfg.path is None:
        return None
    return read_tokenizer(cfg.path, cfg.revision).with_chat_template(template_file(cfg))


def template_file(cfg: TokenizerConfig) -> str | None:
    if cfg.chat_template is None:
        return None
    try:
        return Path(cfg.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer.chat_template={cfg.chat_template}: {error}") from error


def chat_template(cfg: TokenizerConfig, tokenizer: TokenizerFiles | None) -> ChatTemplate:
    """What renders conversations. tokenizer: as given_tokenizer gives it. UserError without a template."""
    source = tokenizer.chat_template if tokenizer else template_file(cfg)
    if source is None:
        raise UserError(
            f"data.source.records=messages: the tokenizer (tokenizer.path={cfg.path}) has no chat "
            "template.\n  Give a file with one: tokenizer.chat_template=FILE.jinja."
        )
    if cfg.chat_template:
        origin = f"tokenizer.chat_template={cfg.chat_template}"
    else:
        origin = f"the chat template of tokenizer.path={cfg.path}"
    special = tokenizer.special_tokens if tokenizer else {"eos_token": EOS, "pad_token": PAD}
    return open_template(source, special, cfg.template_date, origin)


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


def read_tokenizer(path: str | Path, revision: str | None = None) -> TokenizerFiles:
    """The tokenizer of an HF directory, of a model's name on the hub, or of a lone tokenizer.json, whose eos
    must then be <|endoftext|>.

    UserError if there is none, it is unreadable, or it has no end-of-text token.
    """
    origin, name = f"tokenizer.path={path}", str(path)
    path = Path(path).expanduser()
    if not path.exists() and _HUB_NAME.fullmatch(name):
        path = _download(name, revision)
    elif revision is not None:
        raise UserError(f"tokenizer.revision={revision}: has no effect, {origin} is not of the hub")
    main = path / "tokenizer.json" if path.is_dir() else path
    if not main.is_file():
        raise UserError(
            f"{origin}: no tokenizer.json there.\n  Give a tokenizer.json, a Hugging Face directory or a "
            "model's name on the hub that has one, or null to train a tokenizer."
        )
    files = {"tokenizer.json": main.read_bytes()}
    if path.is_dir():
        files |= {name: (path / name).read_bytes() for name in _COMPANIONS if (path / name).is_file()}
    return _describe(files, origin)


def _download(name: str, revision: str | None) -> Path:
    """The directory of the Hugging Face cache that has a hub model's tokenizer files, fetched if need be."""
    from huggingface_hub import snapshot_download  # half a second to import, and only this needs it

    try:
        files = ["tokenizer.json", *_COMPANIONS]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:  # all that the hub's client raises: no network, no such name, ...
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"tokenizer.path={name}: no such file or directory here, and the Hugging Face hub does not give "
            f"it: {reason}\n  Give a path, the hub's name of a model, or null to train a tokenizer. Without "
            "a network, a name works once it has been downloaded."
        ) from error


def _describe(files: dict[str, bytes], origin: str) -> TokenizerFiles:
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config |= json.loads(files.get(name, b"{}"))
    except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot parse
        raise UserError(f"{origin}: not a readable tokenizer: {error}") from error
    special = {name: text for name in _SPECIAL if (text := _token_text(config.get(name)))}
    special.setdefault("eos_token", EOS)
    eos = tokenizer.token_to_id(special["eos_token"])
    if eos is None:
        raise UserError(
            f"{origin}: no token to end documents with: tokenizer_config.json names no eos_token of the "
            f"vocabulary, and {EOS} is not in it.\n  Name one as eos_token there."
        )
    pad = tokenizer.token_to_id(special.get("pad_token", PAD))
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return TokenizerFiles(files, eos, pad, largest + 1, special)


def _token_text(entry: str | dict[str, Any] | None) -> str | None:
    """Special tokens are written as text, or as {"content": text, ...} by older libraries."""
    return entry["content"] if isinstance(entry, dict) else entry


def load_for_encoding(path: Path, plain_text: bool) -> Tokenizer:
    """The tokenizer with nothing cut off. plain_text: `<|endoftext|>` in a text is just text, not the token
    that ends documents; a rendered conversation has such tokens on purpose."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = plain_text
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer.json of a directory. UserError where there is none that can be read."""
    path = directory / "tokenizer.json"
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there, so text cannot be turned into tokens; copy it in") from None
    except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot parse
        raise UserError(f"{path}: not a readable tokenizer: {error}") from error
