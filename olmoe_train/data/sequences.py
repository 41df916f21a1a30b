"""Cut one split of prepared data into sequences: the position of their tokens, and a sample's columns."""

import numpy as np

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.data.packing import open_packs
from olmoe_train.data.repetition import is_repetitive
from olmoe_train.data.tokens import TokenSplit
from olmoe_train.model.cross_entropy import IGNORE_INDEX


class Sequences:
    """The sequences of one split, in the order of the data.

    With packing=concat a sequence is a run of consecutive tokens. With packing=best_fit a sequence is a pack
    of documents.
    """

    def __init__(self, split: TokenSplit, data: DataConfig, keep_tail: bool):
        """
        Args:
            split: The tokens of the split.
            data: The `data` section of the configuration.
            keep_tail: With concat, whether the last tokens, which do not fill a sequence, form a padded
                sequence. If False they are dropped, as in the released run.
        """
        self.split = split
        self.sequence_length = data.sequence_length
        self.mask_documents = data.mask_documents
        self.packs = None
        if data.packing is Packing.best_fit and len(split):
            self.packs = open_packs(split, data.sequence_length)
        self.padded = keep_tail or data.packing is Packing.best_fit
        rounded_up = len(split) + (data.sequence_length - 1 if keep_tail else 0)
        self._count = rounded_up // data.sequence_length if self.packs is None else len(self.packs)
        self.pad = split.manifest.padding

    def __len__(self) -> int:
        return self._count

    @property
    def tokens_per_sequence(self) -> float:
        """Tokens per sequence without padding. With best_fit this is the mean over all packs."""
        return self.sequence_length if self.packs is None else len(self.split) / len(self.packs)

    def pieces(self, index: int) -> list[tuple[int, int]]:
        """Return the (start, stop) token ranges of the split that form sequence `index`."""
        if self.packs is not None:
            return self.packs[index]
        start = index * self.sequence_length
        return [(start, min(start + self.sequence_length, len(self.split)))]

    def sample(self, index: int | None) -> dict[str, np.ndarray]:
        """Return the columns of one sequence.

        Args:
            index: Index of the sequence. None gives a sequence that contains only padding.

        Returns:
            input_ids: int64 [S].
            targets: int64 [S]. A target is the next token of the sequence. It is -100 where the loss mask
                excludes the next token, before padding, at the last position, and where the next token is the
                first of an isolated document, because no earlier token predicts it.
            attention_mask: int64 [S], 0 at padding. Only if sequences may be padded.
            document_starts: int64 [documents], with mask_documents. Padding counts as a separate document.
        """
        pieces = [] if index is None else self.pieces(index)
        ids = np.concatenate([np.empty(0, np.int64), *(self.split.read(*piece) for piece in pieces)])
        predicted = ids.copy()
        if self.split.has_mask:
            is_target = [self.split.read_mask(*piece) for piece in pieces]
            predicted[~np.concatenate([np.empty(0, bool), *is_target])] = IGNORE_INDEX
        starts = self._document_starts(pieces)
        predicted[starts] = IGNORE_INDEX
        # The position before a token predicts the token.
        targets = np.full_like(predicted, IGNORE_INDEX)
        targets[:-1] = predicted[1:]
        sample = {"input_ids": ids, "targets": targets}
        if self.padded:
            padding = (0, self.sequence_length - len(ids))
            sample["input_ids"] = np.pad(ids, padding, constant_values=self.pad)
            sample["targets"] = np.pad(targets, padding, constant_values=IGNORE_INDEX)
            sample["attention_mask"] = np.pad(np.ones_like(ids), padding)
        if self.mask_documents:
            first = [0] if len(ids) else []
            end = [len(ids)] if len(ids) < self.sequence_length else []
            sample["document_starts"] = np.concatenate([first, starts, end]).astype(np.int64)
        return sample

    def _document_starts(self, pieces: list[tuple[int, int]]) -> np.ndarray:
        """Return the positions in the sequence, except 0, at which a document or the rest of one starts.

        With concat the result is empty unless documents are isolated (mask_documents).
        """
        if self.packs is not None:
            return np.cumsum([stop - start for start, stop in pieces], dtype=np.int64)[:-1]
        if self.mask_documents and pieces:
            ((start, stop),) = pieces
            return self.split.document_starts(start, stop) - start
        return np.empty(0, np.int64)


def mask_repetition(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Remove all targets from a sample whose tokens are repetitive.

    Args:
        sample: The columns of `Sequences.sample`.

    Returns:
        The sample with the added column `repetitive` (bool scalar). If it is True, all targets are -100.
    """
    mask = sample.get("attention_mask")
    ids = sample["input_ids"] if mask is None else sample["input_ids"][: mask.sum()]
    repetitive = is_repetitive(ids)
    targets = np.full_like(sample["targets"], IGNORE_INDEX) if repetitive else sample["targets"]
    return {**sample, "targets": targets, "repetitive": np.array(repetitive)}
