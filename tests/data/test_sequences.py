"""What a sequence holds, token by token: documents, targets, padding, and what is left out of the loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.data.sequences import Sequences, mask_repetition
from olmoe_train.data.tokens import open_split
from tests.support.data import EOS, PAD, add_loss_mask, write_prepared

S = 8
# With their ends: 4, 13, 2, 8 and 3 tokens, 30 in all; the 13 and the 8 cross the bounds of 8.
DOCUMENTS = [[20, 21, 22], list(range(30, 42)), [50], list(range(60, 67)), [70, 71]]
TOKENS = [token for document in DOCUMENTS for token in [*document, EOS]]
_ = -100  # no target


def sequences(
    directory: Path, mask: list[int] | None = None, keep_tail: bool = True, **options: Any
) -> Sequences:
    write_prepared(directory, DOCUMENTS)
    if mask is not None:
        add_loss_mask(directory, "train", mask)
    data = DataConfig(dir=str(directory), sequence_length=S, **options)
    return Sequences(open_split(directory, "train"), data, keep_tail)


def columns(found: Sequences) -> dict[str, list[list[int]]]:
    samples = [found.sample(index) for index in range(len(found))]
    return {name: [sample[name].tolist() for sample in samples] for name in samples[0]}


def test_concatenated(tmp_path: Path) -> None:
    found = sequences(tmp_path / "data", keep_tail=False)
    expected = [TOKENS[0:8], TOKENS[8:16], TOKENS[16:24]]
    assert columns(found) == {"input_ids": expected, "targets": [[*row[1:], _] for row in expected]}


def test_concatenated_with_document_masks(tmp_path: Path) -> None:
    got = columns(sequences(tmp_path / "data", mask_documents=True))
    assert got["input_ids"] == [TOKENS[0:8], TOKENS[8:16], TOKENS[16:24], [*TOKENS[24:30], PAD, PAD]]
    assert got["targets"] == [
        [21, 22, EOS, _, 31, 32, 33, _],
        [35, 36, 37, 38, 39, 40, 41, _],
        [_, EOS, _, 61, 62, 63, 64, _],
        [66, EOS, _, 71, EOS, _, _, _],
    ]
    assert got["document_starts"] == [[0, 4], [0], [0, 1, 3], [0, 3, 6]]
    assert got["attention_mask"] == [[1] * 8] * 3 + [[1] * 6 + [0] * 2]


def test_packed(tmp_path: Path) -> None:
    # The 13 fills a sequence and leaves 5; the 8 fills one; 5 + 3, 4 + 2.
    got = columns(sequences(tmp_path / "data", packing=Packing.best_fit, mask_documents=True))
    assert got["input_ids"] == [
        [20, 21, 22, EOS, 50, EOS, PAD, PAD],
        [30, 31, 32, 33, 34, 35, 36, 37],
        [38, 39, 40, 41, EOS, 70, 71, EOS],
        [60, 61, 62, 63, 64, 65, 66, EOS],
    ]
    assert got["targets"] == [
        [21, 22, EOS, _, EOS, _, _, _],
        [31, 32, 33, 34, 35, 36, 37, _],
        [39, 40, 41, EOS, _, 71, EOS, _],
        [61, 62, 63, 64, 65, 66, EOS, _],
    ]
    assert got["attention_mask"] == [[1] * 6 + [0] * 2] + [[1] * 8] * 3
    assert got["document_starts"] == [[0, 4, 6], [0], [0, 5], [0]]


def test_packed_without_document_masks_predicts_no_piece_from_another(tmp_path: Path) -> None:
    masked = columns(sequences(tmp_path / "a", packing=Packing.best_fit, mask_documents=True))
    found = columns(sequences(tmp_path / "b", packing=Packing.best_fit))
    assert "document_starts" not in found
    assert found["targets"] == masked["targets"]


@pytest.mark.parametrize("packing", list(Packing))
def test_loss_mask(tmp_path: Path, packing: Packing) -> None:
    mask = [int(token % 3 == 0) for token in TOKENS]
    masked = columns(sequences(tmp_path / "a", mask, packing=packing))
    whole = columns(sequences(tmp_path / "b", packing=packing))
    assert masked["input_ids"] == whole["input_ids"]
    expected = [[target if target % 3 == 0 else _ for target in row] for row in whole["targets"]]
    assert masked["targets"] == expected


@pytest.mark.parametrize("packing", list(Packing))
def test_nothing_but_padding(tmp_path: Path, packing: Packing) -> None:
    sample = sequences(tmp_path / "data", packing=packing, mask_documents=True).sample(None)
    assert {name: column.tolist() for name, column in sample.items()} == {
        "input_ids": [PAD] * S,
        "targets": [_] * S,
        "attention_mask": [0] * S,
        "document_starts": [0],
    }


def test_repetitive_sequences_lose_their_targets_alone() -> None:
    ids = np.array([9] * 40)
    for tokens, repetitive in ((np.arange(40), False), (ids, True)):
        sample = mask_repetition({"input_ids": tokens, "targets": tokens})
        assert sample["input_ids"].tolist() == tokens.tolist()
        assert sample["targets"].tolist() == ([_] * 40 if repetitive else tokens.tolist())
        assert sample["repetitive"].item() is repetitive


def test_padding_does_not_count_as_repetition() -> None:
    ids = np.concatenate([np.arange(2, 10), np.full(40, PAD)])
    mask = (ids != PAD).astype(np.int64)
    assert not mask_repetition({"input_ids": ids, "targets": ids, "attention_mask": mask})["repetitive"]
