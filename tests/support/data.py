"""Write small prepared directories from lists of tokens with the real writer, and read them back."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from olmoe_train.config.data import DataConfig, SourceConfig, TokenizerConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.manifest import DTYPES, TOKENIZER, Manifest, Split, read_manifest, write_manifest
from olmoe_train.data.prepare.shards import SplitWriter

EOS, PAD = 0, 1
UNLIMITED = 10**9


def write_prepared(
    directory: Path,
    train: Sequence[Sequence[int]],
    validation: Sequence[Sequence[int]] = (),
    *,
    vocab_size: int = 1000,
    dtype: str = "uint16",
    shard_tokens: int = UNLIMITED,
    pad_token_id: int | None = PAD,
) -> Path:
    """Write a prepared directory and return it.

    train, validation: documents as token ids, without the eos token, which is appended to each document.
    """
    (directory / TOKENIZER).mkdir(parents=True)
    (directory / TOKENIZER / "tokenizer.json").write_bytes(b"{}")
    splits: dict[str, Split] = {}
    for name, documents in (("train", train), ("validation", validation)):
        writer = SplitWriter(directory, name, shard_tokens, vocab_size=1 << 17, dtype=DTYPES[dtype])
        for document in documents:
            writer.add(
                np.array([*document, EOS], DTYPES[dtype]), [len(document) + 1], text_bytes=len(document)
            )
        splits[name] = writer.finish()
    manifest = Manifest(
        settings={},
        source="a test",
        skipped_empty_documents=0,
        tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(),
        dtype=dtype,
        vocab_size=vocab_size,
        eos_token_id=EOS,
        pad_token_id=pad_token_id,
        bytes_per_token=1.0,
        unigram_entropy=None,
        train=splits["train"],
        validation=splits["validation"],
    )
    write_manifest(directory, manifest)
    return directory


def add_loss_mask(directory: Path, name: str, mask: Sequence[int]) -> None:
    """Add a loss mask to a split that has one shard. The mask has one number per token."""
    path = f"{name}/shard-00000.mask.u8"
    (directory / path).write_bytes(bytes(mask))
    manifest = read_manifest(directory)
    split: Split = getattr(manifest, name)
    (shard,) = split.shards
    masked = replace(shard, mask_path=path, mask_sha256=hashlib.sha256(bytes(mask)).hexdigest())
    change: dict[str, Any] = {name: replace(split, shards=(masked,))}
    write_manifest(directory, replace(manifest, **change))


def prepare_config(
    directory: Path, *, seed: int = 0, tokenizer: Path | None = None, **source: Any
) -> PrepareConfig:
    """Return a configuration with one process, a validation fraction of 0.2 and a tokenizer of 400 tokens.

    source: fields of `data.source`, which override these defaults.
    """
    source = {"validation_fraction": 0.2, "processes": 1, **source}
    return PrepareConfig(
        seed=seed,
        data=DataConfig(dir=str(directory), source=SourceConfig(**source)),
        tokenizer=TokenizerConfig(path=str(tokenizer) if tokenizer else None, vocab_size=400),
    )


def read_documents(directory: Path, name: str) -> Iterator[list[int]]:
    """Yield the documents of a split, separated by the document index. Each document includes its eos."""
    split: Split = getattr(read_manifest(directory), name)
    for shard in split.shards:
        tokens = np.fromfile(directory / shard.path, "<u2")
        ends = np.fromfile(directory / shard.ends_path, "<u8").astype(np.int64)
        yield from (part.tolist() for part in np.split(tokens, ends)[:-1])


def read_texts(directory: Path, name: str) -> list[str]:
    """Return the decoded documents of a split, without their eos."""
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER / "tokenizer.json"))
    found = read_documents(directory, name)
    return [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in found]


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file under a directory, by relative path."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}
