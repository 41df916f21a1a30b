"""The first micro-batch of a run: of the prepared data, or made up where there is none."""

from dataclasses import replace

import torch
import torch.distributed as dist

from olmoe_train.config.train import TrainConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import build_train_loader
from olmoe_train.data.mixture import mixture_components
from olmoe_train.model.cross_entropy import IGNORE_INDEX
from olmoe_train.training.batch import Batch
from olmoe_train.training.build import build_data


def missing_data(cfg: TrainConfig) -> str | None:
    """The first directory of prepared data that does not exist. None: all do."""
    directories = (source.directory for source in mixture_components(cfg.data))
    return next((str(directory) for directory in directories if not directory.exists()), None)


def first_batches(cfg: TrainConfig, ranks: list[int]) -> list[Batch]:
    """The first micro-batch of each of these ranks, as their loaders give it.

    Raises:
        UserError: The data is damaged, or shorter than a sequence.
    """
    data = build_data(replace(cfg, data=replace(cfg.data, num_workers=0)))
    sizes = BatchSizes.of(cfg.trainer, cfg.data.sequence_length)
    loaders = (
        build_train_loader(data, 0, sizes, rank, dist.get_world_size(), cfg.trainer.micro_batch_size)
        for rank in ranks
    )
    return [next(iter(loader)) for loader in loaders]


def made_up_batch(cfg: TrainConfig) -> Batch:
    """Rows of one token, in the form of next-token prediction; one document a row."""
    rows = cfg.trainer.micro_batch_size * cfg.objective.sequences_per_sample
    length = cfg.data.sequence_length
    ids_BS = torch.full((rows, length), cfg.model.eos_token_id or 0)
    targets_BS = ids_BS.clone()
    targets_BS[:, -1] = IGNORE_INDEX
    batch = {"input_ids": ids_BS, "targets": targets_BS}
    if cfg.data.mask_documents:
        batch["document_offsets"] = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    return batch
