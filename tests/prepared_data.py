"""Small prepared directories, written from lists of tokens by the real writer."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olmoe_train.data.tokens import DTYPES, TOKENIZER, Manifest, write_manifest
from olmoe_train.data.writer import SplitWriter

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
    """`train` and `validation` are documents as token ids, without their ends. Returns the directory."""
    (directory / TOKENIZER).mkdir(parents=True)
    (directory / TOKENIZER / "tokenizer.json").write_bytes(b"{}")
    splits = {}
    for name, documents in (("train", train), ("validation", validation)):
        writer = SplitWriter(directory, name, shard_tokens)
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
        **splits,
    )
    write_manifest(directory, manifest)
    return directory
