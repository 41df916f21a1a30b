"""From prepared tokens to batches, the same global stream whatever the ranks, workers and micro-batches.

The stream's order is a function of the seed, the mixture and one integer, the index of the next sample, which
is all the state that a checkpoint has to keep. What a sample is: sequences.py.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.data.mixture import SCHEDULE, SourceSchedule, mixture_components, read_manifests, source_seed
from olmoe_train.data.packing import ALGORITHM
from olmoe_train.data.sample_order import ORDER, sample_for
from olmoe_train.data.sequences import Sequences, mask_repetition
from olmoe_train.data.tokens import Manifest, open_split, shard_files
from olmoe_train.utils.errors import UserError

Sample = dict[str, np.ndarray]


class TrainingData:
    """The training data of a run, opened once: its manifests, its samples, and what decides their order."""

    def __init__(self, cfg: DataConfig, seed: int) -> None:
        """Reads the manifests. Raises UserError where one is missing or damaged, or where the sources were
        made with different tokenizers."""
        self.cfg, self.seed = cfg, seed
        self.manifests = read_manifests(cfg)

    @cached_property
    def samples(self) -> "TrainSamples":
        """Every sample by its global index; opening them reads the index of every shard, once."""
        return TrainSamples(self.cfg, self.seed)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the stream of samples, as flat JSON values: a run may continue from a sample index
        only where this is equal."""
        manifests = self.manifests
        common = {
            "order": ORDER,
            "seed": self.seed,
            "sequence_length": self.cfg.sequence_length,
            "packing": ALGORITHM if self.cfg.packing is Packing.best_fit else self.cfg.packing.value,
            "tokenizer_sha256": next(iter(manifests.values())).tokenizer_sha256,
        }
        if not self.cfg.mixture:
            return common | _contents(*manifests.values())
        common["mixture"] = f"{SCHEDULE}: {', '.join(manifests)}"
        weights = {source.name: source.weight for source in mixture_components(self.cfg)}
        for name, manifest in manifests.items():
            contents = _contents(manifest) | {"share": weights[name] / sum(weights.values())}
            common |= {f"mixture.{name}.{key}": value for key, value in contents.items()}
        return common


def build_train_loader(
    data: TrainingData,
    start_sample: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> DataLoader[dict[str, torch.Tensor]]:
    """An endless loader of this rank's micro-batches, starting at global sample index `start_sample`.

    Step j (from 0) is samples start_sample + [j * global_batch_size, (j + 1) * global_batch_size) of the
    global order. Rank r gets the r-th contiguous share of them, in micro-batches of `micro_batch_size`
    sequences (B). After j steps the state to save is `start_sample + j * global_batch_size`.

    Yields:
        The columns of `collate`.

    Raises:
        UserError: data is missing or damaged, or a training split is shorter than one sequence.
    """
    assert global_batch_size % (world_size * micro_batch_size) == 0, "preflight refuses this"
    batches = RankMicroBatches(start_sample, global_batch_size, rank, world_size, micro_batch_size)
    return _loader(data.samples, batches, data.cfg.num_workers, data.seed)


def build_eval_batches(
    data: DataConfig, rank: int, world_size: int, micro_batch_size: int, max_sequences: int | None = None
) -> DataLoader[dict[str, torch.Tensor]]:
    """This rank's batches of data.dir's validation split, in order; every rank gets as many batches.

    Every validation token is in exactly one sequence; the last one is padded, and so is the last batch, with
    whole sequences of padding. max_sequences: only the first so many sequences; None: all.

    Yields the columns of `collate`, attention_mask among them.
    """
    dataset = EvalSequences(data)
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


def _contents(manifest: Manifest) -> dict[str, Any]:
    hashes = "".join(digest for shard in manifest.train.shards for _, digest in shard_files(shard))
    return {
        "train_tokens": manifest.train.tokens,
        "train_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
    }


class TrainSamples(Dataset[Sample]):
    """Global sample index -> sample, over all sources of the mixture. UserError for a source shorter than one
    sequence.
    """

    def __init__(self, data: DataConfig, seed: int):
        self.sources = mixture_components(data)
        read_manifests(data)  # complains of sources that do not fit together
        self.sequences = [
            Sequences(open_split(source.directory, "train"), data, keep_tail=False) for source in self.sources
        ]
        for source, sequences in zip(self.sources, self.sequences, strict=True):
            if len(sequences) == 0:
                where = f"the training split of {source.name}" if data.mixture else "the whole training split"
                raise UserError(
                    f"data.sequence_length={data.sequence_length} is longer than {where} "
                    f"({len(sequences.split):,} tokens).\n  Shorten it, or prepare more data."
                )
        # Weights are shares of tokens; packed sequences of one source may be fuller than another's.
        densities = [sequences.tokens_per_sequence for sequences in self.sequences]
        self.schedule = SourceSchedule(
            [s.weight / density for s, density in zip(self.sources, densities, strict=True)]
        )
        several = len(data.mixture) > 0
        self.seeds = [source_seed(seed, i) if several else seed for i in range(len(self.sources))]
        self.repetition_filter = data.repetition_filter

    def __getitem__(self, global_index: int) -> Sample:
        source, index = self.schedule.locate(global_index)
        sequences = self.sequences[source]
        sample = sequences.sample(sample_for(index, len(sequences), self.seeds[source]))
        return mask_repetition(sample) if self.repetition_filter else sample

    @property
    def epoch(self) -> int:
        """Samples of one epoch: of the whole data, or of a mixture's token budgets together."""
        if self.sources[0].budget is None:
            assert len(self.sources) == 1, "validate() refuses epochs of a mixture by weight"
            return len(self.sequences[0])
        pairs = zip(self.sources, self.sequences, strict=True)
        return math.ceil(sum((source.budget or 0) / s.tokens_per_sequence for source, s in pairs))

    def shares(self, samples: int) -> dict[str, dict[str, float]]:
        """For each source, of the first `samples` samples: its share of the tokens, the share that was asked
        for, and its epochs so far.
        """
        drawn = self.schedule.samples_per_source(samples)
        tokens = [n * s.tokens_per_sequence for n, s in zip(drawn, self.sequences, strict=True)]
        whole = sum(source.weight for source in self.sources)
        return {
            source.name: {
                "share": tokens[i] / max(1, sum(tokens)),
                "requested_share": source.weight / whole,
                "epochs": drawn[i] / len(self.sequences[i]),
            }
            for i, source in enumerate(self.sources)
        }


class EvalSequences(Dataset[Sample]):
    """Sequence i of data.dir's validation split; the last may be padded, FILLER is all padding."""

    FILLER = -1

    def __init__(self, data: DataConfig):
        self.sequences = Sequences(open_split(data.dir, "validation"), data, keep_tail=True)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Sample:
        return self.sequences.sample(None if index == self.FILLER else index)


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


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Samples as one batch: every column stacked, but for document_starts.

    input_ids, labels, perhaps attention_mask: int64 [B, S]. repetitive: bool [B], with the repetition filter.
    document_offsets: int32 [documents + 1], with mask_documents: where each document starts in the batch's
    B * S tokens laid end to end, and their number (what attention kernels call cu_seqlens).
    """
    batch = {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples]))
        for name in samples[0]
        if name != "document_starts"
    }
    if "document_starts" in samples[0]:
        tokens, length = batch["input_ids"].numel(), batch["input_ids"].shape[1]
        starts = [sample["document_starts"] + row * length for row, sample in enumerate(samples)]
        batch["document_offsets"] = torch.from_numpy(np.concatenate([*starts, [tokens]]).astype(np.int32))
    return batch


def _loader(
    dataset: Dataset[Any], batches: Iterable[list[int]], num_workers: int, seed: int
) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: a DataLoader draws a seed for its workers, by default from the global one, where
        # a resumed run would then no longer draw the same dropout masks.
        generator=torch.Generator().manual_seed(seed),
    )
