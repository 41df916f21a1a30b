"""Small prepared preferences, written from token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from olmoe_train.data.manifest import Preferences, Split, read_manifest, write_manifest
from tests.support.data import add_loss_mask, write_prepared


@dataclass(frozen=True)
class Document:
    """A prompt with a completion, token ids without the eos, which is a target."""

    prompt: Sequence[int]
    completion: Sequence[int]
    wanted: bool


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> list[Document]:
    return [Document(prompt, chosen, True), Document(prompt, rejected, False)]


def write_preferences(
    directory: Path,
    train: Sequence[Document],
    validation: Sequence[Document] = (),
    *,
    paired: bool = True,
    vocab_size: int = 1000,
) -> Path:
    """Write a prepared directory of preferences, one shard per split, and return it."""
    splits = {"train": train, "validation": validation}
    tokens = {name: [[*one.prompt, *one.completion] for one in split] for name, split in splits.items()}
    write_prepared(directory, tokens["train"], tokens["validation"], vocab_size=vocab_size)
    documents = [*train, *validation]
    for name, split in splits.items():
        if not split:
            continue
        add_loss_mask(directory, name, [bit for one in split for bit in mask_of(one)])
        labels = bytes(one.wanted for one in split)
        path = f"{name}/shard-00000.labels.u8"
        (directory / path).write_bytes(labels)
        manifest = read_manifest(directory)
        written: Split = getattr(manifest, name)
        (shard,) = written.shards
        shard = replace(shard, labels_path=path, labels_sha256=hashlib.sha256(labels).hexdigest())
        changes: dict[str, Any] = {name: replace(written, shards=(shard,))}
        write_manifest(directory, replace(manifest, **changes))
    preferences = Preferences(
        paired=paired,
        records=len(documents) // 2 if paired else len(documents),
        longest=max(len(mask_of(one)) for one in documents),
        cut=0,
        too_long=0,
        unaligned=0,
        equal_when_cut=0,
        desirable=sum(one.wanted for one in documents),
    )
    write_manifest(directory, replace(read_manifest(directory), preferences=preferences))
    return directory


def mask_of(document: Document) -> list[int]:
    return [0] * len(document.prompt) + [1] * (len(document.completion) + 1)
