"""Record the loss of every target token of a training or validation pass. The pass stays what it is.

Shapes: B batch, S sequence, T tokens (B x S), C tokens per chunk of the head, V vocabulary, P parts of the
sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from olmoe_train.model import OlmoeForCausalLM

POSITION_PARTS = 16
"""Parts of the sequence in losses by position; fewer where the sequence has fewer positions."""


@contextmanager
def record_target_losses(model: OlmoeForCausalLM) -> Iterator[list[Tensor]]:
    """Record what the chunked cross-entropy sees of each target in the forward passes within the block.

    Yields:
        fp32 [C] per chunk, in the order of the tokens: the cross-entropy in nats; 0 without a target.
    """
    head = model.lm_head
    compute = head.log_probs
    chunks: list[Tensor] = []

    def recorded(logits_CV: Tensor, target_C1: Tensor, is_target_C1: Tensor) -> tuple[Tensor, Tensor]:
        at_target_C1, softmax_CV = compute(logits_CV, target_C1, is_target_C1)
        chunks.append(-(at_target_C1 * is_target_C1).squeeze(1))
        return at_target_C1, softmax_CV

    head.log_probs = recorded
    try:
        yield chunks
    finally:
        head.log_probs = compute


def sums_by_position(losses_BS: Tensor, is_target_BS: Tensor, parts: int) -> Tensor:
    """Sum the losses and count the targets in equal parts of the sequence.

    Args:
        losses_BS: Cross-entropy in nats, 0 without a target.
        is_target_BS: bool.
        parts: P.

    Returns:
        fp64 [P, 2]: sum and count.
    """
    length = losses_BS.shape[1]
    part_S = torch.arange(length, device=losses_BS.device) * parts // length
    columns_S2 = torch.stack([losses_BS.double().sum(0), is_target_BS.sum(0).double()], 1)
    return columns_S2.new_zeros(parts, 2).index_add_(0, part_S, columns_S2)


def mean_losses(sums_N2: list[list[float]]) -> list[float | None]:
    """Mean of each (sum, count); None where the count is 0."""
    return [total / count if count else None for total, count in sums_N2]
