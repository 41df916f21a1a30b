"""Which micro-batches the passes over whole splits of preferences read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from olmoe_train.config.train import EvaluationConfig, TrainerConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import (
    RankMicroBatches,
    TrainingData,
    build_eval_batches,
    build_train_loader,
)
from olmoe_train.data.mixture import mixture_components, only_directory
from olmoe_train.data.tokens import open_split
from olmoe_train.training.batch import Batch
from olmoe_train.training.objectives.log_probs import REPEATED


@dataclass(frozen=True)
class ValidationSource:
    """The validation split of one source of the data."""

    name: str
    directory: Path
    first_document: int
    """Number of its first document among the validation documents of all sources."""
    documents: int


def validation_sources(data: TrainingData) -> list[ValidationSource]:
    """The sources that have a validation split, in the order of the mixture."""
    found, first = [], 0
    for source in mixture_components(data.cfg):
        documents = data.manifests[source.name].validation.documents
        if documents:
            found.append(ValidationSource(source.name, source.directory, first, documents))
        first += documents
    return found


def validation_batches(
    source: ValidationSource, data: TrainingData, cfg: EvaluationConfig, max_samples: int | None = None
) -> Iterable[Batch]:
    """This rank's micro-batches of a validation split, in the order of the data.

    Args:
        source: The split.
        data: The data of the run.
        cfg: micro_batch_size, in samples.
        max_samples: Samples to read, over all ranks. None: all.
    """
    one = only_directory(data.cfg, source.directory)
    ranks = (dist.get_rank(), dist.get_world_size())
    sizes = (cfg.micro_batch_size, max_samples)
    return build_eval_batches(one, *ranks, *sizes, data.form, source.first_document)


def first_epochs(data: TrainingData, trainer: TrainerConfig) -> Iterator[tuple[int, Iterable[Batch]]]:
    """(Documents, this rank's micro-batches) of the first epoch of each source.

    Without a mixture the micro-batches are those of the run's first epoch, so that a value computed from one
    is bit for bit what the run would compute. Document ids count within the source. The last step is filled
    up with samples of the next epoch, whose documents have the id REPEATED.
    """
    for source in mixture_components(data.cfg):
        one = only_directory(data.cfg, source.directory)
        alone = TrainingData(one, data.seed, data.form)
        yield open_split(source.directory, "train").documents, _first_epoch(alone, trainer)


def _first_epoch(data: TrainingData, trainer: TrainerConfig) -> Iterator[Batch]:
    size = BatchSizes(trainer.global_batch_size)
    layout = (size, dist.get_rank(), dist.get_world_size(), trainer.micro_batch_size)
    samples = data.samples.epoch
    micro_batches = trainer.global_batch_size // (dist.get_world_size() * trainer.micro_batch_size)
    count = -(-samples // trainer.global_batch_size) * micro_batches
    loader = build_train_loader(data, 0, *layout)
    for _, indices, batch in zip(range(count), RankMicroBatches(0, *layout), loader, strict=False):
        repeated = torch.tensor(indices) >= samples
        documents = len(batch["document_ids"]) // len(indices)
        batch["document_ids"][repeated.repeat_interleave(documents)] = REPEATED
        yield batch
