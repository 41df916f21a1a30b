"""One optimizer step's micro-batches on this rank, and counts over the step's global batch.

Shapes: B sequences of a micro-batch, S sequence length.
"""

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.model.cross_entropy import IGNORE_INDEX, shift_labels
from olmoe_train.utils.errors import UserError

log = logging.getLogger(__name__)
Batch = dict[str, Tensor]
"""A micro-batch: the columns of `collate` in data/loader.py, input_ids and targets [B, S] among them."""


DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_offsets")
"""Columns that the decoder reads; of these, input_ids is always there."""


def decoder_inputs(batch: Batch, prefix: str = "") -> Batch:
    """The columns that the decoder reads, without `prefix`, with which their names begin in the batch."""
    return {name: batch[prefix + name] for name in DECODER_INPUTS if prefix + name in batch}


class StepBatches(Iterator[list[Batch]]):
    """Groups a stream of micro-batches into optimizer steps; measures the time spent waiting for them.

    A micro-batch that has labels in Transformers' form, and no targets, gets its targets here.
    """

    def __init__(
        self,
        micro_batches: Iterable[Batch],
        sizes: BatchSizes,
        sequences_per_pass: int,
        columns: tuple[str, ...],
        start_sample: int = 0,
        from_data: bool = True,
    ) -> None:
        """
        Args:
            micro_batches: This rank's, without an end.
            sizes: Sequences of each step, over all ranks.
            sequences_per_pass: Sequences of one micro-batch, over all ranks.
            columns: What the objective reads of each micro-batch.
            start_sample: Sequences drawn before the first step.
            from_data: The batches are the prepared data's, in its order.
        """
        self._stream = iter(micro_batches)
        self._sizes, self._per_pass, self._drawn = sizes, sequences_per_pass, start_sample
        self._columns = columns
        self.from_data = from_data
        self.size = 0
        """Sequences of the last step, over all ranks."""
        self.seconds_waited = 0.0
        """Total over all steps so far."""

    def __next__(self) -> list[Batch]:
        size = self._sizes.after(self._drawn)
        if self._sizes.warmup and size != self.size:
            log.info("%d sequences per step from sequence %d on", size, self._drawn)
        self.size, started = size, time.monotonic()
        step = list(itertools.islice(self._stream, size // self._per_pass))
        self.seconds_waited += time.monotonic() - started
        if len(step) < size // self._per_pass:
            raise UserError(
                "the batches ended before the run did: give an iterable with "
                "trainer.global_batch_size / (trainer.micro_batch_size x ranks) micro-batches for every "
                "step (in the batch-size warm-up, its size in place of global_batch_size), or lower "
                "trainer.max_steps"
            )
        self._drawn += size
        return [self._with_targets(batch) for batch in step]

    def _with_targets(self, batch: Batch) -> Batch:
        batch = dict(batch)
        if (labels := batch.pop("labels", None)) is not None and "targets" not in batch:
            batch["targets"] = shift_labels(labels)
        if missing := [name for name in self._columns if name not in batch]:
            raise UserError(
                f"a micro-batch has no column {', '.join(missing)}; its columns: {', '.join(batch)}"
            )
        return batch


@dataclass(frozen=True)
class Totals:
    """Counts over the step's global batch: fp32 scalars on the device, unless they say otherwise."""

    num_tokens: Tensor
    """Tokens that are not padding; at least 1."""
    num_targets: Tensor
    """Tokens that have a label to predict; at least 1."""
    num_tokens_host: int
    """Tokens that are not padding, on the host."""
    num_positions: int
    """Tokens with padding."""
    sequences_without_targets: int
    repetitive_sequences: int
    """Sequences that data.repetition_filter left out of the loss."""
    stop_requested: bool
    """Whether any rank asked to stop after this step; equal on every rank."""


def count_tokens(micro_batches: list[Batch], stop_requested: bool, device: torch.device) -> Totals:
    """Count the step's global batch with one all-reduce of six numbers on the CPU; no GPU is waited for.

    Removes the column `repetitive` from the batches; the model gets the other columns.
    """
    counts = torch.zeros(6, dtype=torch.int64)
    for batch in micro_batches:
        mask = batch.get("attention_mask")
        counts[0] += batch["input_ids"].numel() if mask is None else mask.sum()
        is_target = batch["targets"] != IGNORE_INDEX
        counts[1] += is_target.sum()
        counts[2] += (~is_target.any(dim=1)).sum()
        if (repetitive := batch.pop("repetitive", None)) is not None:
            counts[3] += repetitive.sum()
        counts[4] += batch["input_ids"].numel()
    counts[5] = int(stop_requested)
    dist.all_reduce(counts)
    tokens, targets = counts[:2].clamp(min=1).to(device, torch.float32, non_blocking=True)
    on_host, _, empty, repetitive_count, positions, stop = counts.tolist()
    return Totals(tokens, targets, on_host, positions, empty, repetitive_count, bool(stop))


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
