"""Load batches from prepared tokens, as one global stream of samples.

The stream does not depend on the number of ranks, workers or micro-batches. Its order is a function of the
seed, the mixture and one integer, the index of the next sample. This integer is the only state that a
checkpoint must keep. The module sequences.py defines what a sample is.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.fingerprint import sources_fingerprint
from olmoe_train.data.manifest import Manifest
from olmoe_train.data.mixture import has_sources, mixture_components, read_manifests, source_seed
from olmoe_train.data.packing import ALGORITHM
from olmoe_train.data.preferences import COMPLETIONS, PAIRS, CollatePreferences, PreferenceSequences
from olmoe_train.data.prompts import PROMPTS, CollatePrompts, PromptSequences
from olmoe_train.data.remote import local_directory
from olmoe_train.data.sample_order import ORDER, sample_for
from olmoe_train.data.sequences import Sequences, mask_repetition
from olmoe_train.data.stages import StagedSchedule, data_stages
from olmoe_train.data.tokens import TokenSplit, open_split
from olmoe_train.utils.errors import UserError

Sample = dict[str, np.ndarray]


@dataclass(frozen=True)
class SampleForm:
    """What a sample is: by default a sequence, or of preferences a pair."""

    single: bool = False
    """Of preferences, whether a sample is one completion, and not a pair."""
    longest_prompt: int | None = None
    """Samples are prompts with answers, of at most this many tokens each. None: they are not prompts."""


SEQUENCE_OR_PAIR = SampleForm()


class TrainingData:
    """The training data of a run, opened once: manifests, samples, and what determines the sample order."""

    def __init__(self, cfg: DataConfig, seed: int, form: SampleForm = SEQUENCE_OR_PAIR) -> None:
        """Read the manifests.

        Args:
            cfg: The `data` section of the configuration.
            seed: Seed of the sample order.
            form: What a sample is.

        Raises:
            UserError: A manifest is missing or damaged, or the sources have different tokenizers.
        """
        self.cfg, self.seed, self.form = cfg, seed, form
        self.manifests = read_manifests(cfg)

    @property
    def has_preferences(self) -> bool:
        """Whether the data consists of preferences."""
        return all(manifest.preferences is not None for manifest in self.manifests.values())

    @cached_property
    def samples(self) -> "TrainSamples":
        """Every sample by its global index. The first access reads the index of every shard."""
        return TrainSamples(self.cfg, self.seed, self.form)

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the stream of samples, as flat JSON values.

        A run may continue from a sample index only if the fingerprint is unchanged.
        """
        manifests = self.manifests
        packing = ALGORITHM if self.cfg.packing is Packing.best_fit else self.cfg.packing.value
        if self.has_preferences:  # packing does not change the samples
            packing = COMPLETIONS if self.form.single else PAIRS
        if self.form.longest_prompt is not None:
            packing = f"{PROMPTS}, at most {self.form.longest_prompt} tokens"
        common = {
            "order": ORDER,
            "seed": self.seed,
            "sequence_length": self.cfg.sequence_length,
            "packing": packing,
            "tokenizer_sha256": next(iter(manifests.values())).tokenizer_sha256,
        }
        return common | sources_fingerprint(self.cfg, manifests)


def build_train_loader(
    data: TrainingData,
    start_sample: int,
    sizes: BatchSizes,
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> DataLoader[dict[str, torch.Tensor]]:
    """Build an endless loader of this rank's micro-batches, starting at sample index `start_sample`.

    A sample is a sequence; of preferences it is a pair, or a single completion.
    Step j, counted from 0, consists of the samples [sizes.samples_after(j, start_sample),
    sizes.samples_after(j + 1, start_sample)) of the global order. Rank r gets the r-th contiguous share of
    these samples. After j steps the state to save is `sizes.samples_after(j, start_sample)`.

    Args:
        data: The training data of the run.
        start_sample: Global index of the first sample.
        sizes: Sequences per step over all ranks. Multiples of world_size * micro_batch_size.
        rank: This rank.
        world_size: Number of ranks.
        micro_batch_size: Sequences per micro-batch (B).

    Returns:
        A loader that yields the columns of `collate`, or of CollatePreferences.

    Raises:
        UserError: Data is missing or damaged, or a training split is shorter than one sequence.
    """
    batches = RankMicroBatches(start_sample, sizes, rank, world_size, micro_batch_size)
    return _loader(
        data.samples,
        batches,
        data.cfg.num_workers,
        data.seed,
        _collate(data.cfg, data.manifests, data.form),
    )


def build_eval_batches(
    data: DataConfig,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    max_sequences: int | None = None,
    form: SampleForm = SEQUENCE_OR_PAIR,
    first_document: int = 0,
) -> DataLoader[dict[str, torch.Tensor]]:
    """Build this rank's batches of the validation split of data.dir, in order.

    Every rank gets the same number of batches. Every validation token is in exactly one sequence. The last
    sequence is padded. The last batch is filled up with sequences that contain only padding.

    Args:
        data: The `data` section of the configuration.
        rank: This rank.
        world_size: Number of ranks.
        micro_batch_size: Sequences per batch and rank (B).
        max_sequences: Use only the first `max_sequences` sequences over all ranks. None uses all.
        form: What a sample is.
        first_document: Of preferences, number of the first document, in the data as a whole.

    Returns:
        A loader that yields the columns of `collate`, including attention_mask, or of CollatePreferences.

    Raises:
        UserError: Data is missing or damaged, or the validation split is empty.
    """
    dataset = EvalSequences(data, form, first_document)
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
    batches = [rows[start : start + micro_batch_size] for start in starts]
    collate_fn = _collate(data, read_manifests(data), form)
    return _loader(dataset, batches, data.num_workers, 0, collate_fn)


AnySequences = Sequences | PreferenceSequences | PromptSequences
"""The samples of one split."""


def _open(
    split: TokenSplit, data: DataConfig, keep_tail: bool, form: SampleForm, first_document: int
) -> AnySequences:
    if form.longest_prompt is not None:
        return PromptSequences(split, form.longest_prompt, first_document)
    if split.manifest.preferences is not None:
        return PreferenceSequences(split, data, form.single, first_document)
    return Sequences(split, data, keep_tail)


def _collate(data: DataConfig, manifests: dict[str, Manifest], form: SampleForm) -> "Collate":
    manifest = next(iter(manifests.values()))
    if form.longest_prompt is not None:
        return CollatePrompts(manifest.padding)
    if manifest.preferences is None:
        return collate
    return CollatePreferences(data, manifest.padding)


class TrainSamples(Dataset[Sample]):
    """Maps a global sample index to a sample, over all sources of the mixture.

    Raises:
        UserError: The training split of a source is shorter than one sequence.
    """

    def __init__(self, data: DataConfig, seed: int, form: SampleForm = SEQUENCE_OR_PAIR):
        """The arguments are those of TrainingData."""
        self.sources = mixture_components(data)
        read_manifests(data)  # raises UserError if the sources do not fit together
        self.sequences: list[AnySequences] = []
        first_document = 0
        for source in self.sources:
            split = open_split(source.directory, "train")
            self.sequences.append(_open(split, data, False, form, first_document))
            first_document += split.documents
        for source, sequences in zip(self.sources, self.sequences, strict=True):
            if len(sequences) == 0:
                where = (
                    f"the training split of {source.name}"
                    if has_sources(data)
                    else "the whole training split"
                )
                raise UserError(
                    f"data.sequence_length={data.sequence_length} is longer than {where} "
                    f"({len(sequences.split):,} tokens).\n  Shorten it, set data.packing=best_fit, which "
                    "pads sequences, or prepare more data."
                )
        self.stages = data_stages(data)
        self.schedule = self._schedule()
        self.seeds = [source_seed(seed, i) for i in range(len(self.sources))]
        if not data.mixture and (not data.stages or data.stages[0].dir is not None):
            self.seeds[0] = seed  # so that stages may be added to a run that began without
        self.repetition_filter = data.repetition_filter

    def __getitem__(self, global_index: int) -> Sample:
        source, index = self.place(global_index)
        sequences = self.sequences[source]
        sample = sequences.sample(index)
        sample |= {"sample_index": np.array(global_index)} if isinstance(sequences, PromptSequences) else {}
        return mask_repetition(sample) if self.repetition_filter else sample

    def place(self, global_index: int) -> tuple[int, int]:
        """Return (source of a sample, number of its sequence within the source)."""
        source, index = self.schedule.locate(global_index)
        return source, sample_for(index, len(self.sequences[source]), self.seeds[source])

    @property
    def epoch(self) -> int:
        """Number of samples per epoch: of the whole data, or of the sum of a mixture's token budgets."""
        if self.sources[0].budget is None:
            assert len(self.sources) == 1, "validate() refuses epochs of a mixture by weight"
            return len(self.sequences[0])
        pairs = zip(self.sources, self.sequences, strict=True)
        return math.ceil(sum((source.budget or 0) / s.tokens_per_sequence for source, s in pairs))

    def _schedule(self) -> StagedSchedule:
        # Weights are shares of tokens, but sequences of one source may be packed fuller than another's.
        numbers = {source.name: number for number, source in enumerate(self.sources)}
        shares = [
            {
                numbers[one.name]: one.weight / self.sequences[numbers[one.name]].tokens_per_sequence
                for one in stage.components
            }
            for stage in self.stages
        ]
        return StagedSchedule(len(self.sources), [stage.first for stage in self.stages], shares)


class EvalSequences(Dataset[Sample]):
    """The sequences of the validation split of data.dir, by index.

    The last sequence may be padded. The index FILLER gives a sequence that contains only padding.
    """

    FILLER = -1

    def __init__(self, data: DataConfig, form: SampleForm = SEQUENCE_OR_PAIR, first_document: int = 0):
        split = open_split(local_directory(data, data.dir), "validation")
        self.sequences = _open(split, data, True, form, first_document)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Sample:
        return self.sequences.sample(None if index == self.FILLER else index)


@dataclass(frozen=True)
class RankMicroBatches:
    """Yields the global sample indices of one rank's micro-batches, without end.

    Every iteration starts again at `start_sample`.
    """

    start_sample: int
    sizes: BatchSizes
    rank: int
    world_size: int
    micro_batch_size: int

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_sample
        while True:
            size = self.sizes.after(step)
            assert size % (self.world_size * self.micro_batch_size) == 0, "preflight refuses this"
            share = size // self.world_size
            first = step + self.rank * share
            for start in range(first, first + share, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))
            step += size

    def of_one_step(self) -> list[list[int]]:
        """Return the micro-batches of the first step."""
        micro_batches = self.sizes.after(self.start_sample) // (self.world_size * self.micro_batch_size)
        return list(itertools.islice(self, micro_batches))


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Stack samples into one batch.

    Args:
        samples: B samples with the columns of `Sequences.sample`.

    Returns:
        input_ids, targets: int64 [B, S].
        attention_mask: int64 [B, S], if the samples have this column.
        repetitive: bool [B], with the repetition filter.
        document_offsets: int32 [documents + 1], with mask_documents. The start of each document in the
            concatenation of the batch's B * S tokens, followed by B * S (cu_seqlens of attention kernels).
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


Collate = Callable[[list[Sample]], dict[str, torch.Tensor]]
"""Samples -> one micro-batch."""


def _loader(
    dataset: Dataset[Any], batches: Iterable[list[int]], num_workers: int, seed: int, collate: Collate
) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # A DataLoader draws a seed for its workers, by default from the global generator. That would change
        # the dropout masks of a resumed run, so the loader gets a separate generator.
        generator=torch.Generator().manual_seed(seed),
    )
