"""Samples and micro-batches of prompts with answers, for objective=grpo.

Any data with a loss mask will do: a document's last run of targets is the answer, and what precedes it the
prompt.

Shapes: B prompts of a micro-batch, S tokens of the longest prompt, A tokens of the longest answer.
"""

import numpy as np
import torch

from olmoe_train.data.tokens import TokenSplit
from olmoe_train.model.cross_entropy import IGNORE_INDEX

PROMPTS = "prompts-v1"
"""Name of this kind of samples, part of the data's fingerprint."""
NO_TOKEN = -1
"""Fills up answers."""
FILLER = -1
"""Document id of a prompt that fills up a batch."""

Sample = dict[str, np.ndarray]


class PromptSequences:
    """The prompts of one split with their answers, in the order of the data."""

    def __init__(self, split: TokenSplit, longest: int, first_document: int = 0) -> None:
        """
        Args:
            split: The tokens of the split, with a loss mask.
            longest: Greatest number of tokens of a prompt. Longer prompts are left out.
            first_document: Number of the split's first document, in the data as a whole.
        """
        self.split, self.first_document = split, first_document
        self.kept: list[int] = []
        self.left_out = 0
        """Documents without an answer, or whose prompt is too long."""
        for number in range(split.documents):
            prompt, answer = self._parts(number)
            if 0 < len(prompt) <= longest and len(answer):
                self.kept.append(number)
            else:
                self.left_out += 1

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def tokens_per_sequence(self) -> float:
        """Tokens per sample, on average."""
        return len(self.split) / max(1, self.split.documents)

    def sample(self, index: int | None) -> Sample:
        """Return the columns of one sample; None gives a prompt of one token that fills up a batch.

        Returns:
            prompt, answer: int64. document_id: int64 scalar.
        """
        if index is None:
            prompt, answer = np.array([self.split.manifest.eos_token_id]), np.empty(0, np.int64)
            return {"prompt": prompt, "answer": answer, "document_id": np.array(FILLER)}
        prompt, answer = self._parts(self.kept[index])
        number = np.array(self.kept[index] + self.first_document)
        return {"prompt": prompt, "answer": answer, "document_id": number}

    def _parts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        piece = self.split.document(number)
        tokens, is_target = self.split.read(*piece), self.split.read_mask(*piece)
        targets = np.flatnonzero(is_target)
        if not len(targets):
            return tokens, tokens[:0]
        last, start = targets[-1], targets[-1]
        while start > 0 and is_target[start - 1]:
            start -= 1
        return tokens[:start], tokens[start : last + 1]


class CollatePrompts:
    """Puts prompts into the rows of a micro-batch, with padding on the left, as decoding needs it."""

    def __init__(self, pad: int) -> None:
        """pad: token id of padding, which attention masks out."""
        self.pad = pad

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Make a micro-batch.

        Returns:
            input_ids, attention_mask: int64 [B, S]. targets: int64 [B, S], none of them a target.
            answers: int64 [B, A], filled up with NO_TOKEN on the right.
            document_ids: int64 [B], FILLER for prompts that fill up the batch.
            sample_index: int64 [B], positions in the order of the samples; only in training.
        """
        width = max(len(sample["prompt"]) for sample in samples)
        longest = max(1, *(len(sample["answer"]) for sample in samples), 1)
        ids = np.full((len(samples), width), self.pad, np.int64)
        mask = np.zeros_like(ids)
        answers = np.full((len(samples), longest), NO_TOKEN, np.int64)
        for row, sample in enumerate(samples):
            prompt, answer = sample["prompt"], sample["answer"]
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
            answers[row, : len(answer)] = answer
        columns = {
            "input_ids": ids,
            "attention_mask": mask,
            "targets": np.full_like(ids, IGNORE_INDEX),
            "answers": answers,
            "document_ids": np.array([sample["document_id"] for sample in samples], np.int64),
        }
        if "sample_index" in samples[0]:
            columns["sample_index"] = np.array([sample["sample_index"] for sample in samples], np.int64)
        return {name: torch.from_numpy(column) for name, column in columns.items()}
