"""What `olmoe prepare` prints: progress, and a summary of what was written."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from olmoe_train.data.prepare.progress import QUARANTINE
from olmoe_train.data.tokens import (
    Manifest,
)
from olmoe_train.utils.errors import UserError


def refuse_other_settings(directory: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
    if differing:
        lines = [
            f"{key}: {_yaml(there.get(key))} there, {_yaml(asked.get(key))} asked for" for key in differing
        ]
        raise UserError(
            "\n    ".join([f"data.dir={directory} was prepared with other settings:", *lines])
            + f"\n  Choose another data.dir, or delete {directory} to prepare it anew."
        )


def _yaml(value: object) -> str:
    return "null" if value is None else str(value)


def unigram_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float | None:
    """Nats a token: cross-entropy of the validation tokens under the training frequencies, add-one smoothed.

    Both int64 [V], occurrences of each token id. None without validation tokens.
    """
    if not validation_counts.any():
        return None
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return float(-(validation_counts @ log_probabilities) / validation_counts.sum())


def progress_bar() -> Progress:
    """On stderr. On a terminal it moves; elsewhere each task leaves one line when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )


def summary(directory: Path, manifest: Manifest) -> str:
    rows = [f"  source      {manifest.source}"]
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        rows.append(
            f"  {name:<11} {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{f'{split.bytes:,} bytes, ' if split.bytes else ''}"
            f"{len(split.shards)} shard(s)"
        )
    if (found := manifest.targets) is not None:
        rows.append(
            f"  targets     {found.tokens:,} tokens of {found.conversations:,} documents; "
            f"{found.without_target:,} have none, in {found.unaligned:,} of them turns cannot be told"
        )
    if manifest.filtered_records:
        rows.append(f"  filtered    {manifest.filtered_records:,} records")
    if manifest.skipped_empty_documents:
        rows.append(f"  skipped     {manifest.skipped_empty_documents:,} empty documents")
    if manifest.quarantined_records:
        rows.append(f"  quarantined {manifest.quarantined_records:,} bad records: {directory / QUARANTINE}")
    ratio = f", {manifest.bytes_per_token:.2f} bytes a token" if manifest.bytes_per_token else ""
    rows.append(f"  tokenizer   {manifest.vocab_size:,} tokens{ratio}")
    if (entropy := manifest.unigram_entropy) is not None:
        rows.append(
            f"  unigram     {entropy:.3f} nats a token (perplexity {math.exp(entropy):,.0f}): "
            "the validation loss of guessing by frequency alone"
        )
    return "\n".join(rows)
