"""Samples and micro-batches of preferences: pairs of completions, or single completions for kto.

A sample is a pair, or a completion with its label. Packing happens within a micro-batch, so a step consists
of the same pairs whatever the packing: only the padding differs.

Shapes: R rows of a micro-batch, S tokens per row, N documents (a prompt with a completion), P targets.
"""

from typing import Any

import numpy as np
import torch

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.data.packing import best_fit_decreasing
from olmoe_train.data.tokens import TokenSplit
from olmoe_train.model.cross_entropy import IGNORE_INDEX

PAIRS, COMPLETIONS = "pairs-v1", "completions-v1"
"""Names of the two kinds of samples, part of the data's fingerprint."""
MISMATCHED = "mismatched_"
"""Prefix of the columns of kto's mismatched completions."""

Sample = dict[str, np.ndarray]


class PreferenceSequences:
    """The pairs of one split, or its single completions, in the order of the data."""

    def __init__(self, split: TokenSplit, data: DataConfig, single: bool, first_document: int = 0) -> None:
        """
        Args:
            split: The tokens of the split, which has labels.
            data: The `data` section of the configuration.
            single: Whether a sample is a completion with its label, and not a pair.
            first_document: Number of the split's first document, in the data as a whole.
        """
        preferences = split.manifest.preferences
        assert preferences is not None, "preflight refuses other data"
        self.split, self.single, self.first_document = split, single, first_document
        self.sequence_length = data.sequence_length
        self.paired = preferences.paired

    def __len__(self) -> int:
        return self.split.documents if self.single else self.split.documents // 2

    @property
    def tokens_per_sequence(self) -> float:
        """Tokens per sample, on average."""
        return len(self.split) / max(1, len(self))

    def sample(self, index: int | None) -> Sample:
        """Return the columns of one sample.

        Args:
            index: Index of the sample. None gives a sample without documents, to fill up a batch.

        Returns:
            tokens: int64, the documents of the sample in a row: chosen and rejected, or a completion.
            is_target: bool per token, whether the token belongs to the completion.
            lengths: int64 [documents].
            document_ids: int64 [documents], their numbers in the data as a whole.
            wanted: bool [documents], the labels.
            mismatched_tokens, mismatched_is_target, mismatched_lengths: for single completions, the prompt
                with the completion of another record.
        """
        if index is None:
            documents: list[tuple[np.ndarray, np.ndarray]] = []
            numbers = range(0)
        else:
            numbers = range(index, index + 1) if self.single else range(2 * index, 2 * index + 2)
            documents = [self._document(number) for number in numbers]
        columns = _columns(documents) | {
            "document_ids": np.array(numbers, np.int64) + self.first_document,
            "wanted": self.split.labels(numbers.start, numbers.stop) == 1,
        }
        if self.single:
            mismatched = [self._mismatched(number, *documents[0]) for number in numbers]
            columns |= {MISMATCHED + name: values for name, values in _columns(mismatched).items()}
        return columns

    def _document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        piece = self.split.document(number)
        return self.split.read(*piece), self.split.read_mask(*piece)

    def _mismatched(
        self, number: int, tokens: np.ndarray, is_target: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The document's prompt with the completion of the record before it, cut at the sequence length.

        TRL rotates completions by one within its batches. Here the record is the one before it in the data,
        the same in every epoch and batch, so the reference's log-probability of it can be stored. Of pairs it
        is the same side of the pair before: the two sides have one prompt.
        """
        other, other_is_target = self._document((number - (2 if self.paired else 1)) % self.split.documents)
        prompt, start = tokens[: int(is_target.argmax())], int(other_is_target.argmax())
        joined = np.concatenate([prompt, other[start:]])[: self.sequence_length]
        learned = np.concatenate([np.zeros(len(prompt), bool), other_is_target[start:]])
        return joined, learned[: self.sequence_length]


def _columns(documents: list[tuple[np.ndarray, np.ndarray]]) -> Sample:
    return {
        "tokens": np.concatenate([np.empty(0, np.int64), *(tokens for tokens, _ in documents)]),
        "is_target": np.concatenate([np.empty(0, bool), *(is_target for _, is_target in documents)]),
        "lengths": np.array([len(tokens) for tokens, _ in documents], np.int64),
    }


class CollatePreferences:
    """Lays the documents of samples out as the rows of a micro-batch. Loader workers get a copy."""

    def __init__(self, data: DataConfig, pad: int) -> None:
        """pad: token id of padding. Any id is correct: attention, loss and routers mask padding out."""
        self.packed = data.packing is Packing.best_fit
        self.sequence_length, self.pad = data.sequence_length, pad

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Make a micro-batch of samples.

        Returns:
            input_ids, targets, attention_mask: int64 [R, S], as in loader.collate.
            document_offsets: int32 [documents + 1], as there; only if packed.
            target_positions: int64 [P], positions that predict a token of a completion, in the R x S tokens
                of the flattened rows; document by document.
            target_ids: int64 [P], the tokens that they predict.
            completion_lengths: int64 [N], the number of these positions of each document.
            document_starts: int64 [N], the first position of each document in the flattened rows.
            document_ids: int64 [N]. wanted: bool [N].
            mismatched_*: all but the last two once more, for mismatched completions, if there are any.
        """
        batch = self._rows(samples, "")
        for name in ("document_ids", "wanted"):
            batch[name] = torch.from_numpy(np.concatenate([sample[name] for sample in samples]))
        if MISMATCHED + "tokens" in samples[0]:
            batch |= {MISMATCHED + name: column for name, column in self._rows(samples, MISMATCHED).items()}
        return batch

    def _rows(self, samples: list[Sample], prefix: str) -> dict[str, torch.Tensor]:
        tokens, is_target, lengths = (
            np.concatenate([sample[prefix + name] for sample in samples])
            for name in ("tokens", "is_target", "lengths")
        )
        rows_N, starts_N, rows, width = self._places(lengths)
        ids, targets = np.full((rows, width), self.pad), np.full((rows, width), IGNORE_INDEX)
        mask = np.zeros((rows, width), np.int64)
        positions, counts = [np.empty(0, np.int64)], []
        first = 0
        for row, start, length in zip(rows_N, starts_N, lengths, strict=True):
            document = slice(first, first + length)
            ids[row, start : start + length] = tokens[document]
            mask[row, start : start + length] = 1
            predicting = np.flatnonzero(is_target[document][1:])
            targets[row, start + predicting] = tokens[document][1:][predicting]
            positions.append(row * width + start + predicting)
            counts.append(len(predicting))
            first += length
        target_positions = np.concatenate(positions)
        batch: dict[str, Any] = {
            "input_ids": ids,
            "targets": targets,
            "attention_mask": mask,
            "target_positions": target_positions,
            "target_ids": targets.ravel()[target_positions],
            "completion_lengths": np.array(counts, np.int64),
            "document_starts": rows_N * width + starts_N,
        }
        if self.packed:
            # Padding counts as a document of its own.
            filled = mask.sum(1)
            padding = (np.arange(rows) * width + filled)[filled < width]
            offsets = np.concatenate([rows_N * width + starts_N, padding, [rows * width]])
            batch["document_offsets"] = np.sort(offsets).astype(np.int32)
        return {name: torch.from_numpy(column) for name, column in batch.items()}

    def _places(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Return (row and first column of each document, number of rows, tokens per row).

        Without documents there is one row of one token of padding: every rank has to run the model.
        """
        if len(lengths) == 0:
            return lengths, lengths, 1, 1
        if not self.packed:
            return np.arange(len(lengths)), np.zeros(len(lengths), np.int64), len(lengths), int(lengths.max())
        rows_N = best_fit_decreasing(lengths, self.sequence_length)
        starts_N = np.zeros_like(lengths)
        fill = np.zeros(int(rows_N.max()) + 1, np.int64)
        for document, row in enumerate(rows_N):
            starts_N[document] = fill[row]
            fill[row] += lengths[document]
        return rows_N, starts_N, len(fill), int(fill.max())
