"""Chunked cross-entropy of the output head: the full [T, V] logits are never in memory.

Shapes: B batch, S sequence, T tokens, C tokens per chunk, D hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# The label of a position that has no target; the loss ignores such positions.
IGNORE_INDEX = -100


# Rows of logits in memory at the same time: 512 x 50304 x 4 bytes = 98 MiB at OLMoE's vocabulary.
HEAD_CHUNK_ROWS = 512


def shift_labels(labels_BS: Tensor) -> Tensor:
    """Turn labels in Transformers' form into targets.

    Args:
        labels_BS: int64; the label of a position is the token at the same position.

    Returns:
        targets_BS, int64: the token to predict at each position, which is the next label; IGNORE_INDEX at the
        last position.
    """
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORE_INDEX)


def target_log_probs(logits_CV: Tensor, target_C1: Tensor, is_target_C1: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the softmax from which the gradient is made.

    Args:
        logits_CV: Logits, any float dtype.
        target_C1: int64, the target's index in the vocabulary; any valid index in rows without a target.
        is_target_C1: bool, false in rows without a target.

    Returns:
        The log softmax at the target, fp32 [C, 1], and the softmax in the dtype of `logits_CV`, [C, V]. The
        softmax is 0 in rows without a target.
    """
    log_probs_CV = logits_CV.float().log_softmax(-1)
    at_target_C1 = log_probs_CV.gather(1, target_C1)
    return at_target_C1, log_probs_CV.exp_().mul_(is_target_C1).to(logits_CV.dtype)


def cross_entropy_sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    log_probs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = target_log_probs,
) -> Tensor:
    """Sum over target tokens of -log softmax(hidden @ weight.T)[label].

    The function processes HEAD_CHUNK_ROWS rows at a time and computes the gradients of each chunk in forward.
    Memory therefore holds one chunk of logits and one fp32 [V, D] weight gradient, but never the [T, V]
    logits. Softmax and loss are fp32 for every input dtype.

    Args:
        hidden_TD: Output of the final norm, any float dtype.
        weight_VD: Weight of the head.
        labels_T: int64; IGNORE_INDEX (-100) at positions without a target.
        log_probs: target_log_probs, or a compiled version of that function.

    Returns:
        The summed loss in nats, an fp32 scalar.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, labels_T, needs_gradient, log_probs)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        needs_gradient: bool,
        log_probs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        logits_chunk = hidden_TD.new_empty(min(HEAD_CHUNK_ROWS, len(hidden_TD)), len(weight_VD))
        if needs_gradient:
            d_hidden_TD = torch.empty_like(hidden_TD)
            # fp32: a bf16 sum would be rounded once per chunk.
            d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, hidden_TD.shape[0], HEAD_CHUNK_ROWS):
            rows = slice(start, start + HEAD_CHUNK_ROWS)
            hidden_CD, labels_C = hidden_TD[rows], labels_T[rows]
            is_target_C1 = (labels_C != IGNORE_INDEX)[:, None]
            target_C1 = labels_C.clamp(min=0)[:, None]
            logits_CV = torch.mm(hidden_CD, weight_VD.t(), out=logits_chunk[: len(hidden_CD)])
            at_target_C1, d_logits_CV = log_probs(logits_CV, target_C1, is_target_C1)
            loss -= (at_target_C1 * is_target_C1).sum()
            if needs_gradient:
                # d loss / d logits = softmax - onehot(target). Computing exp(log p) - 1 at the target in fp32
                # and rounding once keeps precision when p is close to 1.
                d_target_C1 = (at_target_C1.exp() - 1) * is_target_C1
                d_logits_CV.scatter_(1, target_C1, d_target_C1.to(d_logits_CV.dtype))
                torch.mm(d_logits_CV, weight_VD, out=d_hidden_TD[rows])
                if d_weight_VD.dtype == hidden_CD.dtype:
                    d_weight_VD.addmm_(d_logits_CV.t(), hidden_CD)
                else:
                    d_weight_VD += d_logits_CV.t() @ hidden_CD
        if needs_gradient:
            ctx.save_for_backward(d_hidden_TD, d_weight_VD.to(weight_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden_TD, d_weight_VD = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            d_hidden_TD * d_loss.to(d_hidden_TD.dtype),
            d_weight_VD * d_loss.to(d_weight_VD.dtype),
            None,
            None,
            None,
        )
