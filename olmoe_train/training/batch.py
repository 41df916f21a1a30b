"""One optimizer step's micro-batches on this rank, and counts over the step's global batch.

Shapes: B batch, S sequence.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.model.cross_entropy import IGNORE_INDEX

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Totals:
    """Counts over the step's global batch; scalars on the device unless they say otherwise."""

    tokens: Tensor
    """Tokens that are not padding."""
    targets: Tensor
    """Tokens that have a label to predict."""
    tokens_int: int
    """`tokens` on the host."""
    sequences_without_targets: int
    repetitive_sequences: int
    """Left out of the loss by data.repetition_filter."""
    stop_requested: bool
    """Whether any rank has had a signal to stop; every rank reads the same."""


def count_tokens(micro_batches: list[Batch], stop_requested: bool, device: torch.device) -> Totals:
    """One all-reduce of five numbers on the CPU, where the batches are: the GPU is not waited for.

    Takes the column `repetitive` out of the batches; the model gets the others.
    """
    counts = torch.zeros(5, dtype=torch.int64)
    for batch in micro_batches:
        mask = batch.get("attention_mask")
        counts[0] += batch["input_ids"].numel() if mask is None else mask.sum()
        is_target = batch["labels"][:, 1:] != IGNORE_INDEX
        counts[1] += is_target.sum()
        counts[2] += (~is_target.any(dim=1)).sum()
        if (repetitive := batch.pop("repetitive", None)) is not None:
            counts[3] += repetitive.sum()
    counts[4] = int(stop_requested)
    dist.all_reduce(counts)
    tokens, targets = counts[:2].clamp(min=1).to(device, torch.float32, non_blocking=True)
    on_host, _, empty, repetitive_count, stop = counts.tolist()
    return Totals(tokens, targets, on_host, empty, repetitive_count, bool(stop))


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
