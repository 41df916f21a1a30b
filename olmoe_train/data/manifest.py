"""The manifest of prepared data: what `olmoe prepare` writes beside the tokens, and how it is read.

docs/reference/data-format.md describes the format.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.utils.errors import UserError

FORMAT = "olmoe-train-tokens"
VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
ENDS_DTYPE = np.dtype("<u8")
ORIGINS_DTYPE = np.dtype("<u8")
SOURCE_FILES = "source_files.json"
LINE_BITS = 40
"""An origin is the number of the file times 2^LINE_BITS, plus the line: 16 million files of 10^12 lines."""
MASK_DTYPE = LABELS_DTYPE = np.dtype("u1")


@dataclass(frozen=True)
class Shard:
    """The files of one shard: tokens, document index and loss mask."""

    path: str
    """Token file, relative to the prepared directory."""
    tokens: int
    sha256: str
    ends_path: str
    """Document index: the end of each document (position after its eos) in tokens of this shard, uint64."""
    documents: int
    ends_sha256: str
    mask_path: str | None = None
    """Loss mask: one uint8 per token, 1 if the token is a target. None: every token is a target."""
    mask_sha256: str | None = None
    labels_path: str | None = None
    """Labels of preferences: one uint8 per document, 1 for a chosen or wanted completion and 0 for another.
    None: the data has no preferences."""
    labels_sha256: str | None = None
    origins_path: str | None = None
    """Origin of each document, uint64: the number of its file in source_files.json, times 2^40, plus the line
    or row, counted from 1. None: the origins were not recorded."""
    origins_sha256: str | None = None


@dataclass(frozen=True)
class SourceFiles:
    """The list of the files of the corpus, which the origins of documents refer to."""

    path: str
    """JSON list of paths, relative to the prepared directory."""
    count: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Contents of the training or the validation split."""

    documents: int
    tokens: int
    """With the eos that ends each document."""
    bytes: int
    """UTF-8 bytes of the text, without the eos tokens."""
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Targets:
    """Counts over both splits for data in which not every token is a target.

    The last five are 0 in older manifests and for prompts with completions.
    """

    conversations: int
    """Records: conversations, or prompts with their completions. With data.source.turns=expand, several
    documents are made of one."""
    unaligned: int
    """Documents in which the target text could not be located among the tokens. They have no targets."""
    without_target: int
    """Documents without any target token, the unaligned ones included."""
    tokens: int
    """Target tokens."""
    empty_turns: int = 0
    """Turns to learn in which the assistant says nothing. They are not learnt."""
    excluded_turns: int = 0
    """Turns of the assistant that say "weight": 0 or "train": false. They are not learnt if
    data.source.learn=marked."""
    system_only: int = 0
    """Conversations that have system messages only."""
    ends_with_user: int = 0
    """Conversations whose last message is the user's. It has no answer to learn."""
    gain_by_expanding: int = 0
    """Conversations without targets that would have some with data.source.turns=expand."""


@dataclass(frozen=True)
class Preferences:
    """Counts over both splits for data of preferences."""

    paired: bool
    """Documents 2i and 2i + 1 of a split are the chosen and the rejected completion of one prompt. False:
    every document is a completion with its own label."""
    records: int
    """Pairs, or completions with labels."""
    longest: int
    """Tokens of the longest document."""
    desirable: int
    """Documents with the label 1."""
    cut: int = 0
    """Records that lost tokens (data.source.truncate)."""
    too_long: int = 0
    """Records that are left out because they are too long."""
    unaligned: int = 0
    """Records that are left out because the completion could not be located among the tokens."""
    equal_when_cut: int = 0
    """Pairs that are left out because cutting made their sides equal."""


@dataclass(frozen=True)
class Manifest:
    """Description of a prepared directory, stored as manifest.json. The defaults are for older manifests."""

    settings: dict[str, Any]
    """Values of the configuration keys that determine the bytes of the shards."""
    source: str
    """Description of the corpus for people."""
    skipped_empty_documents: int
    tokenizer_sha256: str | None
    """Hash of tokenizer/tokenizer.json. None: there is no tokenizer (only with data.format=olmo)."""
    dtype: str
    vocab_size: int
    """Largest token id of the tokenizer plus one."""
    eos_token_id: int
    pad_token_id: int | None
    bytes_per_token: float
    """UTF-8 bytes of text per token, over both splits."""
    unigram_entropy: float | None
    """Cross-entropy, in nats per token, of the validation targets under the add-one smoothed frequencies of
    the training targets. A model that does no better uses no context. None if there are no validation
    tokens.
    """
    train: Split
    validation: Split
    quarantined_records: int = 0
    """Bad records, written to quarantine.jsonl."""
    filtered_records: int = 0
    """Records that data.source.keep, min_characters and max_characters leave out."""
    targets: Targets | None = None
    """None: every token is a target."""
    tokens_in_place: bool = False
    """The token files lie elsewhere and are named by absolute paths (data.format=olmo)."""
    preferences: Preferences | None = None
    """None: the data has no preferences."""
    split_note: str | None = None
    """Sentence: how the splits differ from data.source.validation_fraction, in a small corpus. None: they do
    not."""
    source_files: SourceFiles | None = None
    """None: the origins of documents were not recorded."""

    @property
    def padding(self) -> int:
        """Token id of padding. Any id is correct: attention, loss and router statistics mask out padding."""
        return self.eos_token_id if self.pad_token_id is None else self.pad_token_id


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json into a directory that is not published yet."""
    record: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    for shard in (*record["train"]["shards"], *record["validation"]["shards"]):
        for optional in ("mask", "labels", "origins"):
            if shard[f"{optional}_path"] is None:
                del shard[f"{optional}_path"], shard[f"{optional}_sha256"]
    for later in ("split_note", "preferences", "source_files"):
        if record[later] is None:
            del record[later]
    (directory / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of a prepared directory, and check its types and counts and the tokenizer's hash.

    Raises:
        UserError: There is no prepared data, or the manifest or the tokenizer has changed since.
    """
    directory = Path(directory).expanduser()
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(
            f"data.dir={directory}: no prepared data there (no {MANIFEST}).\n"
            f"  Run `olmoe prepare data=python_stdlib data.dir={directory}` first."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        manifest = _parse_manifest(record)
    except (ValueError, TypeError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise damaged(path, f"not a manifest of this program: {reason}", directory) from error
    if manifest.tokenizer_sha256 is None:
        return manifest
    tokenizer = directory / TOKENIZER / "tokenizer.json"
    if not tokenizer.is_file():
        raise damaged(tokenizer, "missing", directory)
    if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
        raise damaged(
            tokenizer, "not the tokenizer that the tokens were made with (its hash differs)", directory
        )
    return manifest


def _parse_manifest(record: dict[str, Any]) -> Manifest:
    """Build a manifest from JSON. KeyError, TypeError or ValueError if it is incomplete or inconsistent."""
    if record["format"] != FORMAT:
        raise ValueError(f"format is {record['format']!r}, not {FORMAT!r}")
    if record["version"] != VERSION:
        raise ValueError(f"version is {record['version']!r}; this program reads {VERSION}")
    # Fields that were added later have a default. Unknown fields, of a newer program, are ignored.
    values = {
        field.name: record[field.name]
        for field in fields(Manifest)
        if field.default is MISSING or field.name in record
    }
    in_place = values.get("tokens_in_place", False)
    values |= {name: _parse_split(record[name], name, in_place) for name in ("train", "validation")}
    if values.get("targets") is not None:
        values["targets"] = Targets(**values["targets"])
    if values.get("preferences") is not None:
        values["preferences"] = Preferences(**values["preferences"])
    if values.get("source_files") is not None:
        values["source_files"] = SourceFiles(**values["source_files"])
        _check_inside(values["source_files"].path)
    manifest = Manifest(**values)
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype is {manifest.dtype!r}, not {' or '.join(DTYPES)}")
    if manifest.vocab_size > 1 << 8 * DTYPES[manifest.dtype].itemsize:
        raise ValueError(f"a vocab_size of {manifest.vocab_size} does not fit dtype {manifest.dtype}")
    for name in ("eos_token_id", "pad_token_id"):
        token = getattr(manifest, name)
        if not ((token is None and name == "pad_token_id") or 0 <= token < manifest.vocab_size):
            raise ValueError(f"{name} is {token}, outside the vocabulary of {manifest.vocab_size}")
    return manifest


def _parse_split(record: dict[str, Any], name: str, tokens_in_place: bool) -> Split:
    shards = tuple(Shard(**shard) for shard in record["shards"])
    split = Split(record["documents"], record["tokens"], record["bytes"], shards)
    for key in ("tokens", "documents"):
        total = sum(getattr(shard, key) for shard in shards)
        if total != getattr(split, key):
            raise ValueError(f"{name}.{key} is {getattr(split, key)}, but its shards add up to {total}")
    for shard in shards:
        for relative, _ in shard_files(shard):
            if not (tokens_in_place and relative == shard.path):
                _check_inside(relative)
    return split


def _check_inside(relative: str) -> None:
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise ValueError(f"shard path {relative!r} leaves the prepared directory")


def damaged(path: Path | str, problem: str, directory: Path) -> UserError:
    """The error for a file of prepared data that is not what the manifest says."""
    return UserError(
        f"{path}: {problem}.\n  The prepared data is damaged: restore the file, "
        f"or delete {directory} and run `olmoe prepare ... data.dir={directory}` again."
    )


def shard_files(shard: Shard) -> list[tuple[str, str]]:
    """List (path, SHA-256) of each file of a shard. ValueError for a file without a hash or the reverse."""
    return _files(shard, ("mask", "labels", "origins"))


def sample_files(shard: Shard) -> list[tuple[str, str]]:
    """The files of `shard_files` that decide what a sample contains. The origins of documents do not."""
    return _files(shard, ("mask", "labels"))


def _files(shard: Shard, optional: tuple[str, ...]) -> list[tuple[str, str]]:
    files = [(shard.path, shard.sha256), (shard.ends_path, shard.ends_sha256)]
    for name in optional:
        path, sha256 = getattr(shard, f"{name}_path"), getattr(shard, f"{name}_sha256")
        if (path is None) != (sha256 is None):
            raise ValueError(f"{shard.path} has only one of {name}_path and {name}_sha256")
        if path is not None:
            files.append((path, sha256))
    return files
