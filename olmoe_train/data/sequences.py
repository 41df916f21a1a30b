"""One split of prepared data as sequences: where the tokens of each are, and the columns of a sample."""

import numpy as np

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.data.packing import open_packs
from olmoe_train.data.repetition import is_repetitive
from olmoe_train.data.tokens import TokenSplit
from olmoe_train.model.cross_entropy import IGNORE_INDEX


class Sequences:
    """Sequence i, in the order of the data: consecutive tokens (packing=concat), or a pack of documents.

    keep_tail: with concat, tokens at the end that do not fill a sequence are one all the same, padded;
    otherwise they are dropped, as in the released run.
    """

    def __init__(self, split: TokenSplit, data: DataConfig, keep_tail: bool):
        self.split = split
        self.sequence_length = data.sequence_length
        self.mask_documents = data.mask_documents
        self.packs = None
        if data.packing is Packing.best_fit and len(split):
            self.packs = open_packs(split, data.sequence_length)
        self.padded = keep_tail or data.packing is Packing.best_fit
        rounded_up = len(split) + (data.sequence_length - 1 if keep_tail else 0)
        self._count = rounded_up // data.sequence_length if self.packs is None else len(self.packs)
        # Any id serves: padding is masked out of attention, loss and router statistics.
        manifest = split.manifest
        self.pad = manifest.eos_token_id if manifest.pad_token_id is None else manifest.pad_token_id

    def __len__(self) -> int:
        return self._count

    @property
    def tokens_per_sequence(self) -> float:
        """Padding not counted: the mean with best_fit."""
        return self.sequence_length if self.packs is None else len(self.split) / len(self.packs)

    def pieces(self, index: int) -> list[tuple[int, int]]:
        """The (start, stop) that sequence `index` is made of, in tokens of the split."""
        if self.packs is not None:
            return self.packs[index]
        start = index * self.sequence_length
        return [(start, min(start + self.sequence_length, len(self.split)))]

    def sample(self, index: int | None) -> dict[str, np.ndarray]:
        """Columns of sequence `index`; None: nothing but padding.

        input_ids, labels: int64 [S]. A label is the token itself (the model shifts), or -100: where the loss
        mask says so, at padding, and at the first token of a document that is by itself, which nothing
        before it predicts. attention_mask: int64 [S], 0 at padding, where there may be any.
        document_starts: int64 [documents] with mask_documents; padding is a document of its own.
        """
        pieces = [] if index is None else self.pieces(index)
        ids = np.concatenate([np.empty(0, np.int64), *(self.split.read(*piece) for piece in pieces)])
        labels = ids.copy()
        if self.split.has_mask:
            is_target = [self.split.read_mask(*piece) for piece in pieces]
            labels[~np.concatenate([np.empty(0, bool), *is_target])] = IGNORE_INDEX
        starts = self._document_starts(pieces)
        labels[starts] = IGNORE_INDEX
        sample = {"input_ids": ids, "labels": labels}
        if self.padded:
            padding = (0, self.sequence_length - len(ids))
            sample["input_ids"] = np.pad(ids, padding, constant_values=self.pad)
            sample["labels"] = np.pad(labels, padding, constant_values=IGNORE_INDEX)
            sample["attention_mask"] = np.pad(np.ones_like(ids), padding)
        if self.mask_documents:
            first = [0] if len(ids) else []
            end = [len(ids)] if len(ids) < self.sequence_length else []
            sample["document_starts"] = np.concatenate([first, starts, end]).astype(np.int64)
        return sample

    def _document_starts(self, pieces: list[tuple[int, int]]) -> np.ndarray:
        """Places in the sequence, 0 left out, where a document (or what is left of one) starts; with concat
        only if that makes a difference.
        """
        if self.packs is not None:
            return np.cumsum([stop - start for start, stop in pieces], dtype=np.int64)[:-1]
        if self.mask_documents and pieces:
            ((start, stop),) = pieces
            return self.split.document_starts(start, stop) - start
        return np.empty(0, np.int64)


def mask_repetition(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The sample without targets if its tokens repeat themselves; column `repetitive` (bool) says so."""
    mask = sample.get("attention_mask")
    ids = sample["input_ids"] if mask is None else sample["input_ids"][: mask.sum()]
    repetitive = is_repetitive(ids)
    labels = np.full_like(sample["labels"], IGNORE_INDEX) if repetitive else sample["labels"]
    return {**sample, "labels": labels, "repetitive": np.array(repetitive)}
