"""A step's micro-batches as they come: from the prepared data, or from an iterable of the caller."""

import pytest
import torch

from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.model.cross_entropy import IGNORE_INDEX
from olmoe_train.training.batch import StepBatches

IDS = torch.tensor([[5, 6, 7, 8]])
COLUMNS = ("input_ids", "targets")


def test_labels_are_shifted_once_and_targets_never() -> None:
    """Labels in Transformers' form are the tokens at the same positions; targets are the next tokens."""
    labels = torch.tensor([[5, IGNORE_INDEX, 7, 8]])
    targets = torch.tensor([[IGNORE_INDEX, 7, 8, IGNORE_INDEX]])
    given = [{"input_ids": IDS, "labels": labels}, {"input_ids": IDS, "targets": targets}]
    step = next(StepBatches(given, BatchSizes(2), 1, COLUMNS))
    for batch in step:
        assert set(batch) == {"input_ids", "targets"}
        assert batch["targets"].tolist() == targets.tolist()
    assert "labels" in given[0]  # the caller's own batch stays as it was


def test_a_column_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="no column targets; its columns: input_ids, attention_mask"):
        next(StepBatches([{"input_ids": IDS, "attention_mask": IDS}], BatchSizes(1), 1, COLUMNS))
