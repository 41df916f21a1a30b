"""Keeps a split from being empty where a hash chooses the documents and the corpus is small."""

from olmoe_train.data.prepare.progress import Counts
from olmoe_train.data.tokens import Manifest


def held_out_below(manifest: Manifest, counts: Counts, fraction: float) -> int | None:
    """Decide whether to divide the corpus anew, and say so.

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
    records = counts.documents - counts.further
    what = f"data.source.validation_fraction={fraction:g}"
    if least == greatest:  # a single document, or several with the same id
        if records > 1:
            return None
        print(f"{what}: there is only one document, so none is held out for validation")
        return None if train else 0
    if train:
        print(f"{what}: it chose none of {records:,} documents; one document is held out for validation")
        return least + 1
    print(f"{what}: it chose all {records:,} documents for validation; one document is left for training")
    return greatest
