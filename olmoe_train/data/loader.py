"""From prepared tokens to batches, the same global stream whatever the ranks, workers and micro-batches.

Samples are consecutive windows of `sequence_length` tokens of the concatenated documents, as the released
OLMoE was trained (arXiv 2409.02060, section 2; documents end with eos, windows ignore them). The stream's
order is a function of the seed and one integer, the index of the next sample, which is all the state that a
checkpoint has to keep.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from olmoe_train.config import DataConfig
from olmoe_train.data.order import ORDER, sample_for
from olmoe_train.data.tokens import TokenSplit, open_split, read_manifest
from olmoe_train.errors import UserError

IGNORED_LABEL = -100  # Transformers' label of a position without a target


def build_train_loader(
    data: DataConfig,
    seed: int,
    start_sample: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> DataLoader[dict[str, torch.Tensor]]:
    """An endless loader of this rank's micro-batches, from global sample index `start_sample` on.

    Step j (from 0) is samples start_sample + [j * global_batch_size, (j + 1) * global_batch_size) of the
    global order; rank r has the r-th contiguous share of them, in micro-batches of `micro_batch_size`
    sequences (B). After j steps the state to save is `start_sample + j * global_batch_size`.

    Yields {"input_ids", "labels"}, both int64 [B, S] and equal: the model shifts labels, as Transformers'
    does. Raises UserError for missing or damaged data, or a training split shorter than one sequence.
    """
    assert global_batch_size % (world_size * micro_batch_size) == 0, "validate() refuses this"
    dataset = TrainSamples(open_split(data.dir, "train"), data.sequence_length, seed)
    batches = RankMicroBatches(start_sample, global_batch_size, rank, world_size, micro_batch_size)
    return _loader(dataset, batches, data.num_workers, seed)


def build_eval_batches(
    data: DataConfig, rank: int, world_size: int, micro_batch_size: int, max_sequences: int | None = None
) -> DataLoader[dict[str, torch.Tensor]]:
    """This rank's batches of the validation split, in order; every rank gets the same number of batches.

    Every validation token is in exactly one sequence; the last one is padded, and so is the last batch, with
    whole sequences of padding. max_sequences: only the first so many sequences; None: all.

    Yields {"input_ids", "labels", "attention_mask"}, all int64 [B, S]; padding has label -100 and attention
    mask 0.
    """
    dataset = EvalSequences(open_split(data.dir, "validation"), data.sequence_length)
    count = len(dataset) if max_sequences is None else min(max_sequences, len(dataset))
    if count == 0:
        raise UserError(
            f"data.dir={data.dir}: its validation split is empty.\n"
            "  Prepare it again, elsewhere, with data.source.validation_fraction above 0."
        )
    global_batch_size = micro_batch_size * world_size
    steps = -(-count // global_batch_size)
    rows = [index if index < count else EvalSequences.FILLER for index in range(steps * global_batch_size)]
    starts = range(rank * micro_batch_size, len(rows), global_batch_size)
    return _loader(
        dataset, [rows[start : start + micro_batch_size] for start in starts], data.num_workers, seed=0
    )


def fingerprint(data: DataConfig, seed: int) -> dict[str, Any]:
    """What decides the stream: a run may go on from a sample index only where this is equal. JSON values,
    flat.
    """
    manifest = read_manifest(data.dir)
    shards = "".join(shard.sha256 for shard in manifest.train.shards)
    return {
        "order": ORDER,
        "seed": seed,
        "sequence_length": data.sequence_length,
        "train_tokens": manifest.train.tokens,
        "train_sha256": hashlib.sha256(shards.encode()).hexdigest(),
        "tokenizer_sha256": manifest.tokenizer_sha256,
    }


class TrainSamples(Dataset[dict[str, torch.Tensor]]):
    """Global sample index -> sequence. The tail that does not fill a sequence is dropped, as in the released
    run.
    """

    def __init__(self, tokens: TokenSplit, sequence_length: int, seed: int):
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_samples = len(tokens) // sequence_length
        if self.num_samples == 0:
            raise UserError(
                f"data.sequence_length={sequence_length} is longer than the whole training split "
                f"({len(tokens):,} tokens).\n  Shorten it, or prepare more data."
            )

    def __getitem__(self, global_index: int) -> dict[str, torch.Tensor]:
        start = sample_for(global_index, self.num_samples, self.seed) * self.sequence_length
        input_ids = torch.from_numpy(self.tokens.read(start, start + self.sequence_length))
        return {"input_ids": input_ids, "labels": input_ids}


class EvalSequences(Dataset[dict[str, torch.Tensor]]):
    """Sequence i of the split in order; the last may be padded, FILLER is all padding."""

    FILLER = -1

    def __init__(self, tokens: TokenSplit, sequence_length: int):
        self.tokens = tokens
        self.sequence_length = sequence_length
        manifest = tokens.manifest
        # Any id serves: padding is masked out of attention, loss and router statistics.
        self.pad = manifest.eos_token_id if manifest.pad_token_id is None else manifest.pad_token_id

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.sequence_length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = len(self.tokens) if index == self.FILLER else index * self.sequence_length
        real = self.tokens.read(start, min(start + self.sequence_length, len(self.tokens)))
        padding = (0, self.sequence_length - len(real))
        columns = {
            "input_ids": np.pad(real, padding, constant_values=self.pad),
            "labels": np.pad(real, padding, constant_values=IGNORED_LABEL),
            "attention_mask": np.pad(np.ones_like(real), padding),
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}


@dataclass(frozen=True)
class RankMicroBatches:
    """Global sample indices of each of one rank's micro-batches, without end; from the start at every
    iteration.
    """

    start_sample: int
    global_batch_size: int
    rank: int
    world_size: int
    micro_batch_size: int

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch_size // self.world_size
        for first in itertools.count(self.start_sample + self.rank * share, self.global_batch_size):
            for start in range(first, first + share, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))


def _loader(
    dataset: Dataset[dict[str, torch.Tensor]], batches: Iterable[list[int]], num_workers: int, seed: int
) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: a DataLoader draws a seed for its workers, by default from the global one, where
        # a resumed run would then no longer draw the same dropout masks.
        generator=torch.Generator().manual_seed(seed),
    )
