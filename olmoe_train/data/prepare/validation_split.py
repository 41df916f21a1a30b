"""Keeps a split from being empty where a hash chooses the documents and the corpus is small."""

from olmoe_train.data.manifest import Manifest
from olmoe_train.data.prepare.progress import Counts


def held_out_below(manifest: Manifest, counts: Counts, fraction: float) -> int | None:
    """Decide whether to divide the corpus anew.

    Args:
        manifest: What preparing the corpus with `fraction` gave.
        counts: Its counts.
        fraction: Share of the documents to hold out. 0: the corpus is divided as it is meant to be.

    Returns:
        The hash below which documents are to be held out. None: keep the division.
    """
    train, validation = manifest.train.documents, manifest.validation.documents
    least, greatest = counts.least_hash, counts.greatest_hash
    if not fraction or least is None or greatest is None or (train and validation):
        return None
    if least == greatest:  # a single document, or several with the same id
        return None if train or counts.records_with_text > 1 else 0
    return least + 1 if train else greatest


def split_note(counts: Counts, below: int | None, fraction: float) -> str | None:
    """Say how the division of a small corpus differs from what `fraction` asks for.

    Args:
        counts: The counts of the corpus.
        below: What `held_out_below` decided.
        fraction: As there.

    Returns:
        One sentence. None: the division is as asked for.
    """
    records, what = counts.records_with_text, f"data.source.validation_fraction={fraction:g}"
    if fraction and records == 1:
        return f"{what}: there is only one document, so none is held out for validation"
    if below is None:
        return None
    if below == counts.greatest_hash:
        return f"{what} chose all {records:,} documents for validation; one document is left for training"
    return f"{what} chose none of {records:,} documents; one document is held out for validation"
