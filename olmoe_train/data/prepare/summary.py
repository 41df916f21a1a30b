"""The progress bar and the summary that `olmoe prepare` prints, and its check for changed settings."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from olmoe_train.data.manifest import Manifest, Preferences, Targets
from olmoe_train.data.prepare.progress import QUARANTINE
from olmoe_train.utils.errors import UserError


def check_same_settings(directory: Path, stored: dict[str, Any], requested: dict[str, Any]) -> None:
    """Raise UserError if a directory was prepared with other settings than those that are requested now."""
    differing = [key for key in {**stored, **requested} if stored.get(key) != requested.get(key)]
    if differing:
        lines = [
            f"{key}: {_yaml(stored.get(key))} there, {_yaml(requested.get(key))} requested"
            for key in differing
        ]
        raise UserError(
            "\n    ".join([f"data.dir={directory} was prepared with other settings:", *lines])
            + f"\n  Choose another data.dir, or delete {directory} to prepare it again."
        )


def _yaml(value: object) -> str:
    return "null" if value is None else str(value)


def unigram_entropy(train_counts: np.ndarray, validation_counts: np.ndarray) -> float | None:
    """Return the cross-entropy of the validation tokens under the training frequencies, in nats per token.

    Args:
        train_counts: Occurrences of each token id in the training targets, int64 [V]. Smoothed by adding one.
        validation_counts: Occurrences of each token id in the validation targets, int64 [V].

    Returns:
        None if there are no validation tokens.
    """
    if not validation_counts.any():
        return None
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return float(-(validation_counts @ log_probabilities) / validation_counts.sum())


def progress_bar() -> Progress:
    """Create the progress bar on stderr. If that is not a terminal, each task prints one line at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )


def no_targets(targets: Targets, documents: int) -> str:
    """Say why data without any target is refused."""
    gain = targets.gain_by_expanding
    return (
        f"data.source.records: no training target in {documents:,} documents; in "
        f"{targets.unaligned:,} of them the target text was not found among the tokens.\n"
        + (f"  With data.source.turns=expand, {gain:,} conversations would have targets.\n" if gain else "")
        + "  docs/guides/fine-tune.md says what a chat template must satisfy."
    )


def _turns(found: Targets, marks_count: bool) -> list[str]:
    """Describe what is peculiar about the conversations, one line each. Nothing that does not occur."""
    learnt = "are not learnt" if marks_count else "are learnt; data.source.learn=marked leaves them out"
    lines = {
        f"{found.empty_turns:,} empty turns of the assistant are not learnt": found.empty_turns,
        f'{found.excluded_turns:,} turns with "weight": 0 or "train": false {learnt}': found.excluded_turns,
        f"{found.system_only:,} conversations have a system message only": found.system_only,
        f"{found.ends_with_user:,} conversations end with the user": found.ends_with_user,
        f"{found.gain_by_expanding:,} conversations without targets would have some with "
        "data.source.turns=expand": found.gain_by_expanding,
    }
    return [
        f"  {'turns' if not place else '':<11} {line}"
        for place, line in enumerate(line for line, count in lines.items() if count)
    ]


def left_out(found: Preferences) -> list[str]:
    """Say why preferences are left out, one phrase per reason that occurs."""
    reasons = {
        "are too long": found.too_long,
        "are left out because the completion was not found among the tokens": found.unaligned,
        "are left out because cutting made their sides equal": found.equal_when_cut,
    }
    return [f"{count:,} {reason}" for reason, count in reasons.items() if count]


def _preferences(found: Preferences) -> list[str]:
    what = "pairs" if found.paired else f"completions, {found.desirable:,} of them wanted"
    lines = [f"{found.records:,} {what}; the longest has {found.longest:,} tokens"]
    lines += [f"{found.cut:,} were cut"] if found.cut else []
    return [
        f"  {'preferences' if not place else '':<11} {line}"
        for place, line in enumerate([*lines, *left_out(found)])
    ]


def summary(directory: Path, manifest: Manifest) -> str:
    """Describe prepared data in a few lines."""
    rows = [f"  source      {manifest.source}"]
    paired = manifest.preferences is not None and manifest.preferences.paired
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        count = f"{split.documents // 2:,} pairs" if paired else f"{split.documents:,} documents"
        rows.append(
            f"  {name:<11} {count}, {split.tokens:,} tokens, "
            f"{f'{split.bytes:,} bytes, ' if split.bytes else ''}"
            f"{len(split.shards)} shard(s)"
        )
    if manifest.split_note:
        rows.append(f"  {'':<11} {manifest.split_note}")
    if manifest.preferences is not None:
        rows += _preferences(manifest.preferences)
    elif (found := manifest.targets) is not None:
        rows.append(
            f"  targets     {found.tokens:,} tokens of {found.conversations:,} documents; "
            f"{found.without_target:,} documents have none (in {found.unaligned:,} the target text was not "
            "found among the tokens)"
        )
        rows += _turns(found, manifest.settings.get("data.source.learn") == "marked")
    if manifest.filtered_records:
        rows.append(f"  filtered    {manifest.filtered_records:,} records")
    if manifest.skipped_empty_documents:
        rows.append(f"  skipped     {manifest.skipped_empty_documents:,} empty documents")
    if manifest.quarantined_records:
        rows.append(f"  quarantined {manifest.quarantined_records:,} bad records: {directory / QUARANTINE}")
    ratio = f", {manifest.bytes_per_token:.2f} bytes per token" if manifest.bytes_per_token else ""
    rows.append(f"  tokenizer   {manifest.vocab_size:,} tokens{ratio}")
    if (entropy := manifest.unigram_entropy) is not None:
        rows.append(
            f"  unigram     {entropy:.3f} nats per token (perplexity {math.exp(entropy):,.0f}): "
            "validation loss of a model that knows only token frequencies"
        )
    return "\n".join(rows)
