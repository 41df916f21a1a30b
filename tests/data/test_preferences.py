"""Samples and micro-batches of preferences, packed and not, against tokens written by hand.

Shapes: R rows, S tokens per row, N documents, P targets.
"""

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.data.preferences import MISMATCHED, CollatePreferences, PreferenceSequences, Sample
from olmoe_train.data.tokens import open_split
from tests.support.data import EOS
from tests.support.preferences import Document, pair, write_preferences

PAD = 3
# With the eos the documents have 5, 4, 3, 7 tokens: the rows of best fit, of 12 tokens, are 5 + 7 and 4 + 3.
PAIRS = [*pair([10, 11], [20, 21], [30]), *pair([12], [22], [40, 41, 42, 43, 44])]
SINGLES = [Document([10, 11], [20, 21], True), Document([12], [30], False), Document([13, 14], [40], True)]


def sequences(
    directory: Path, documents: list[Document], length: int = 12, **options: bool
) -> PreferenceSequences:
    single, paired = options.get("single", False), options.get("paired", True)
    write_preferences(directory, documents, paired=paired)
    data = DataConfig(dir=str(directory), sequence_length=length)
    return PreferenceSequences(open_split(directory, "train"), data, single, first_document=100)


def collate(samples: list[Sample], packing: Packing, length: int = 12) -> dict[str, Tensor]:
    return CollatePreferences(DataConfig(dir="", sequence_length=length, packing=packing), PAD)(samples)


def targets_of_documents(batch: dict[str, Tensor], prefix: str = "") -> list[list[int]]:
    return [
        part.tolist()
        for part in batch[prefix + "target_ids"].split(batch[prefix + "completion_lengths"].tolist())
    ]


def test_a_pair_is_both_documents_with_their_labels(tmp_path: Path) -> None:
    data = sequences(tmp_path, PAIRS)
    assert len(data) == 2
    sample = data.sample(1)
    assert sample["tokens"].tolist() == [12, 22, EOS, 12, 40, 41, 42, 43, 44, EOS]
    assert sample["is_target"].tolist() == [False, True, True, False] + [True] * 6
    assert sample["lengths"].tolist() == [3, 7]
    assert sample["document_ids"].tolist() == [102, 103]
    assert sample["wanted"].tolist() == [True, False]


@pytest.mark.parametrize("packing", [Packing.none, Packing.best_fit])
def test_targets_of_each_document_are_its_completion_and_eos(tmp_path: Path, packing: Packing) -> None:
    data = sequences(tmp_path, PAIRS)
    batch = collate([data.sample(0), data.sample(1)], packing)
    expected = [[20, 21, EOS], [30, EOS], [22, EOS], [40, 41, 42, 43, 44, EOS]]
    assert targets_of_documents(batch) == expected
    assert batch["document_ids"].tolist() == [100, 101, 102, 103]
    assert batch["wanted"].tolist() == [True, False, True, False]
    # The position of a target is that of the token before the target.
    flat = batch["input_ids"].flatten()
    assert torch.equal(batch["targets"].flatten()[batch["target_positions"]], batch["target_ids"])
    assert torch.equal(flat[batch["target_positions"] + 1], batch["target_ids"])
    assert (batch["targets"] != -100).sum() == len(batch["target_ids"])
    assert batch["attention_mask"].sum() == 5 + 4 + 3 + 7
    assert (flat[batch["attention_mask"].flatten() == 0] == PAD).all()


def test_rows_without_packing(tmp_path: Path) -> None:
    data = sequences(tmp_path, PAIRS)
    batch = collate([data.sample(0), data.sample(1)], Packing.none)
    assert batch["input_ids"].tolist() == [
        [10, 11, 20, 21, EOS, PAD, PAD],
        [10, 11, 30, EOS, PAD, PAD, PAD],
        [12, 22, EOS, PAD, PAD, PAD, PAD],
        [12, 40, 41, 42, 43, 44, EOS],
    ]
    assert batch["target_positions"].tolist() == [1, 2, 3, 8, 9, 14, 15, 21, 22, 23, 24, 25, 26]
    assert "document_offsets" not in batch


def test_packed_rows_and_offsets(tmp_path: Path) -> None:
    data = sequences(tmp_path, PAIRS)
    batch = collate([data.sample(0), data.sample(1)], Packing.best_fit)
    assert batch["input_ids"].tolist() == [
        [10, 11, 20, 21, EOS, 12, 40, 41, 42, 43, 44, EOS],
        [10, 11, 30, EOS, 12, 22, EOS, *[PAD] * 5],
    ]
    # Starts of the documents, of the padding, and the end.
    assert batch["document_offsets"].dtype == torch.int32
    assert batch["document_offsets"].tolist() == [0, 5, 12, 16, 19, 24]
    assert batch["completion_lengths"].tolist() == [3, 2, 2, 6]
    assert batch["target_positions"].tolist() == [1, 2, 3, 13, 14, 16, 17, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("packing", [Packing.none, Packing.best_fit])
def test_a_sample_that_fills_up_a_batch_has_no_document(tmp_path: Path, packing: Packing) -> None:
    data = sequences(tmp_path, PAIRS)
    alone = collate([data.sample(None)], packing)
    assert alone["input_ids"].tolist() == [[PAD]]
    assert alone["attention_mask"].tolist() == [[0]]
    for name in ("target_positions", "target_ids", "completion_lengths", "document_ids", "wanted"):
        assert len(alone[name]) == 0, name
    filled, unfilled = (
        collate([data.sample(0), data.sample(None)], packing),
        collate([data.sample(0)], packing),
    )
    assert all(torch.equal(filled[name], unfilled[name]) for name in unfilled)


@pytest.mark.parametrize("packing", [Packing.none, Packing.best_fit])
def test_mismatched_completions_are_those_of_the_record_before(tmp_path: Path, packing: Packing) -> None:
    data = sequences(tmp_path, SINGLES, single=True, paired=False)
    assert len(data) == 3
    batch = collate([data.sample(index) for index in range(3)], packing)
    assert targets_of_documents(batch) == [[20, 21, EOS], [30, EOS], [40, EOS]]
    assert targets_of_documents(batch, MISMATCHED) == [[40, EOS], [20, 21, EOS], [30, EOS]]
    prompts = data.sample(2)[MISMATCHED + "tokens"].tolist()
    assert prompts == [13, 14, 30, EOS]
    flat = batch[MISMATCHED + "input_ids"].flatten()
    assert torch.equal(flat[batch[MISMATCHED + "target_positions"] + 1], batch[MISMATCHED + "target_ids"])


def test_the_partner_in_pairs_is_the_same_side_of_the_pair_before(tmp_path: Path) -> None:
    data = sequences(tmp_path, PAIRS, single=True)
    assert len(data) == 4
    mismatched = [data.sample(index)[MISMATCHED + "tokens"].tolist() for index in range(4)]
    assert mismatched == [
        [10, 11, 22, EOS],
        [10, 11, 40, 41, 42, 43, 44, EOS],
        [12, 20, 21, EOS],
        [12, 30, EOS],
    ]


def test_a_mismatched_completion_is_cut_at_the_sequence_length(tmp_path: Path) -> None:
    sample = sequences(tmp_path, PAIRS, 7, single=True).sample(1)
    assert sample[MISMATCHED + "tokens"].tolist() == [10, 11, 40, 41, 42, 43, 44]
    assert sample[MISMATCHED + "is_target"].tolist() == [False, False] + [True] * 5
    assert sample[MISMATCHED + "lengths"].tolist() == [7]


class Samples(torch.utils.data.Dataset[Sample]):
    """The samples as a map-style dataset, which a loader worker gets by pickle."""

    def __init__(self, data: PreferenceSequences) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        return self.data.sample(index)


def test_a_copy_in_a_worker_makes_the_same_batches(tmp_path: Path) -> None:
    data = sequences(tmp_path, SINGLES, single=True, paired=False)
    data.sample(0)  # opens the memory maps, which a copy must not contain
    assert len(pickle.dumps(data)) < 10_000
    collator = CollatePreferences(DataConfig(dir="", sequence_length=12, packing=Packing.best_fit), PAD)
    here, there = (
        list(
            DataLoader(
                Samples(data),
                batch_size=2,
                collate_fn=collator,
                num_workers=workers,
                multiprocessing_context=context,
            )
        )
        for workers, context in ((0, None), (1, "forkserver"))
    )
    assert len(here) == len(there) == 2
    for mine, other in zip(here, there, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
