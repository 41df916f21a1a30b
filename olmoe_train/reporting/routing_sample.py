"""A sample of prepared data on which the routing of a model is counted. It does not depend on the number of
ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from olmoe_train.config.data import DataConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import TrainingData, build_train_loader
from olmoe_train.reporting.routing_counts import Batch


@dataclass(frozen=True)
class TrainingSample:
    """This rank's batches of the first sequences of training data, in the order of a run with seed 0."""

    data: DataConfig
    sequences: int
    """Number of sequences, over all ranks."""
    micro_batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        """Number of batches, equal on every rank."""
        return -(-self.sequences // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Batches with an attention_mask, which is 0 in sequences that only fill up the last batches."""
        size = self.micro_batch_size
        sizes = BatchSizes(size * self.world_size)
        loader = build_train_loader(
            TrainingData(self.data, seed=0), 0, sizes, self.rank, self.world_size, size
        )
        for index, batch in enumerate(islice(loader, len(self))):
            first = (index * self.world_size + self.rank) * size
            mask_BS = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).clone()
            mask_BS[max(0, self.sequences - first) :] = 0
            yield {**batch, "attention_mask": mask_BS}


def training_sample(
    data: DataConfig, max_sequences: int, micro_batch_size: int, rank: int, world_size: int
) -> TrainingSample:
    """The first `max_sequences` sequences of the training data, or one epoch if that is less.

    Raises:
        UserError: Data is missing or damaged, or a training split is shorter than one sequence.
    """
    if not data.mixture and not data.stages:
        max_sequences = min(max_sequences, TrainingData(data, seed=0).samples.epoch)
    return TrainingSample(data, max_sequences, micro_batch_size, rank, world_size)
