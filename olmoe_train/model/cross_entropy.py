"""Chunked cross-entropy and log-probabilities of the output head: the [T, V] logits are never in memory.

Shapes: B batch, S sequence, T tokens, P positions with a target, C tokens per chunk, D hidden, V vocabulary,
R rank of an adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


@dataclass(frozen=True)
class HeadAdapter:
    """The adapter's part of the logits: gain x (hidden @ weight.T + low @ b.T) (adapters/linear.py)."""

    low_TR: Tensor
    """Hidden states times A, scaled."""
    b_VR: Tensor
    """B."""
    gain_V: Tensor | None = None
    """Factor of each logit; None: 1."""


def cross_entropy_sum(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    log_probs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = target_log_probs,
    adapter: HeadAdapter | None = None,
) -> Tensor:
    """Sum over target tokens of -log softmax(hidden @ weight.T)[label].

    The function processes HEAD_CHUNK_ROWS rows at a time and computes the gradients of each chunk in forward.
    Memory therefore holds one chunk of logits and one fp32 [V, D] weight gradient (none for a frozen weight),
    but never the [T, V] logits. Softmax and loss are fp32 for every input dtype.

    Args:
        hidden_TD: Output of the final norm, any float dtype.
        weight_VD: Weight of the head.
        labels_T: int64; IGNORE_INDEX (-100) at positions without a target.
        log_probs: target_log_probs, or a compiled version of that function.
        adapter: The head's adapter, in the dtype of `hidden_TD`. None: no adapter.

    Returns:
        The summed loss in nats, an fp32 scalar.
    """
    parts = (None, None, None) if adapter is None else (adapter.low_TR, adapter.b_VR, adapter.gain_V)
    inputs = [tensor for tensor in (hidden_TD, weight_VD, *parts) if tensor is not None]
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _ChunkedCrossEntropy.apply(hidden_TD, weight_VD, *parts, labels_T, needs_gradient, log_probs)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        low_TR: Tensor | None,
        b_VR: Tensor | None,
        gain_V: Tensor | None,
        labels_T: Tensor,
        needs_gradient: bool,
        log_probs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        loss = hidden_TD.new_zeros((), dtype=torch.float32)
        logits_chunk = hidden_TD.new_empty(min(HEAD_CHUNK_ROWS, len(hidden_TD)), len(weight_VD))
        gradients = None
        if needs_gradient:
            gradients = _Gradients(hidden_TD, weight_VD, low_TR, b_VR, gain_V, weight_VD.requires_grad)
        for start in range(0, hidden_TD.shape[0], HEAD_CHUNK_ROWS):
            rows = slice(start, start + HEAD_CHUNK_ROWS)
            labels_C = labels_T[rows]
            is_target_C1 = (labels_C != IGNORE_INDEX)[:, None]
            target_C1 = labels_C.clamp(min=0)[:, None]
            raw_CV, logits_CV = _logits(rows, logits_chunk, hidden_TD, weight_VD, low_TR, b_VR, gain_V)
            at_target_C1, d_logits_CV = log_probs(logits_CV, target_C1, is_target_C1)
            loss -= (at_target_C1 * is_target_C1).sum()
            if gradients is not None:
                # d loss / d logits = softmax - onehot(target). Computing exp(log p) - 1 at the target in fp32
                # and rounding once keeps precision when p is close to 1.
                d_target_C1 = (at_target_C1.exp() - 1) * is_target_C1
                d_logits_CV.scatter_(1, target_C1, d_target_C1.to(d_logits_CV.dtype))
                gradients.add(rows, d_logits_CV, raw_CV)
        if gradients is not None:
            ctx.save_for_backward(*gradients.rounded())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = (None if tensor is None else tensor * d_loss.to(tensor.dtype) for tensor in saved)
        return (*gradients, None, None, None)


def target_log_probs_of(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    targets_P: Tensor,
    log_probs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = target_log_probs,
    adapter: HeadAdapter | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each position.

    A loss that is not linear in these values weights each position differently, and the weights are known
    only in backward. The backward pass therefore computes each chunk of logits again. Memory holds one chunk
    of logits and one fp32 [V, D] weight gradient. The softmax is fp32 for every input dtype.

    Args:
        hidden_PD: Output of the final norm at the positions, any float dtype.
        weight_VD: Weight of the head.
        targets_P: int64, without IGNORE_INDEX.
        log_probs: target_log_probs, or a compiled version of that function.
        adapter: The head's adapter, in the dtype of `hidden_PD`. None: no adapter.

    Returns:
        fp32 [P] (fp64 for fp64 inputs), in nats.
    """
    parts = (None, None, None) if adapter is None else (adapter.low_TR, adapter.b_VR, adapter.gain_V)
    return _ChunkedLogProbs.apply(hidden_PD, weight_VD, *parts, targets_P, log_probs)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        low_PR: Tensor | None,
        b_VR: Tensor | None,
        gain_V: Tensor | None,
        targets_P: Tensor,
        log_probs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        exact = torch.promote_types(hidden_PD.dtype, torch.float32)
        out_P = hidden_PD.new_empty(len(hidden_PD), dtype=exact)
        chunk = hidden_PD.new_empty(min(HEAD_CHUNK_ROWS, len(hidden_PD)), len(weight_VD))
        for start in range(0, len(hidden_PD), HEAD_CHUNK_ROWS):
            rows = slice(start, start + HEAD_CHUNK_ROWS)
            _, logits_CV = _logits(rows, chunk, hidden_PD, weight_VD, low_PR, b_VR, gain_V)
            at_target_C = logits_CV.gather(1, targets_P[rows, None]).squeeze(1).to(exact)
            out_P[rows] = at_target_C - logits_CV.to(exact).logsumexp(-1)
        ctx.save_for_backward(hidden_PD, weight_VD, low_PR, b_VR, gain_V, targets_P)
        ctx.log_probs = log_probs
        return out_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_P: Tensor) -> tuple[Tensor | None, ...]:
        hidden_PD, weight_VD, low_PR, b_VR, gain_V, targets_P = ctx.saved_tensors
        gradients = _Gradients(hidden_PD, weight_VD, low_PR, b_VR, gain_V, ctx.needs_input_grad[1])
        chunk = hidden_PD.new_empty(min(HEAD_CHUNK_ROWS, len(hidden_PD)), len(weight_VD))
        for start in range(0, len(hidden_PD), HEAD_CHUNK_ROWS):
            rows = slice(start, start + HEAD_CHUNK_ROWS)
            raw_CV, logits_CV = _logits(rows, chunk, hidden_PD, weight_VD, low_PR, b_VR, gain_V)
            target_C1, d_out_C1 = targets_P[rows, None], d_out_P[rows, None]
            at_target_C1, d_logits_CV = ctx.log_probs(logits_CV, target_C1, torch.ones_like(target_C1) > 0)
            # d log p / d logits = onehot(target) - softmax; see _ChunkedCrossEntropy for the target.
            d_target_C1 = at_target_C1.exp() - 1
            d_logits_CV.scatter_(1, target_C1, d_target_C1.to(d_logits_CV.dtype))
            d_logits_CV *= -d_out_C1.to(d_logits_CV.dtype)
            gradients.add(rows, d_logits_CV, raw_CV)
        return (*gradients.rounded(), None, None)


def _logits(
    rows: slice,
    out: Tensor,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    low_TR: Tensor | None,
    b_VR: Tensor | None,
    gain_V: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(Logits of the rows before the adapter's gain, logits), [C, V]. The first ones are in `out`."""
    hidden_CD = hidden_TD[rows]
    raw_CV = torch.mm(hidden_CD, weight_VD.t(), out=out[: len(hidden_CD)])
    if low_TR is not None and b_VR is not None:
        raw_CV.addmm_(low_TR[rows], b_VR.t())
    return raw_CV, raw_CV if gain_V is None else raw_CV * gain_V


class _Gradients:
    """Gradients of the summed loss with respect to the tensor inputs, summed over the chunks."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        low_TR: Tensor | None,
        b_VR: Tensor | None,
        gain_V: Tensor | None,
        of_weight: bool,
    ) -> None:
        """of_weight: whether the weight needs a gradient."""
        self.hidden_TD, self.weight_VD, self.low_TR, self.b_VR, self.gain_V = (
            hidden_TD,
            weight_VD,
            low_TR,
            b_VR,
            gain_V,
        )
        self.d_hidden_TD = torch.empty_like(hidden_TD)
        # fp32: a bf16 sum would be rounded once per chunk.
        self.d_weight_VD = _fp32_zeros(weight_VD) if of_weight else None
        self.d_low_TR = None if low_TR is None else torch.empty_like(low_TR)
        self.d_b_VR = None if b_VR is None else _fp32_zeros(b_VR)
        self.d_gain_V = None if gain_V is None else _fp32_zeros(gain_V)

    def add(self, rows: slice, d_logits_CV: Tensor, raw_CV: Tensor) -> None:
        """Add a chunk.

        Args:
            rows: The tokens of the chunk.
            d_logits_CV: Gradient of the logits; overwritten.
            raw_CV: The logits before the gain.
        """
        if self.gain_V is not None and self.d_gain_V is not None:
            self.d_gain_V += (d_logits_CV * raw_CV).sum(0, dtype=self.d_gain_V.dtype)
            d_logits_CV *= self.gain_V
        torch.mm(d_logits_CV, self.weight_VD, out=self.d_hidden_TD[rows])
        if self.d_weight_VD is not None:
            _add_product(self.d_weight_VD, d_logits_CV.t(), self.hidden_TD[rows])
        if self.low_TR is not None and self.b_VR is not None:
            assert self.d_low_TR is not None
            assert self.d_b_VR is not None
            torch.mm(d_logits_CV, self.b_VR, out=self.d_low_TR[rows])
            _add_product(self.d_b_VR, d_logits_CV.t(), self.low_TR[rows])

    def rounded(self) -> tuple[Tensor | None, ...]:
        """The gradients in the dtypes of the inputs; None for inputs without a gradient."""
        dtype = self.weight_VD.dtype
        sums = (self.d_weight_VD, self.d_low_TR, self.d_b_VR, self.d_gain_V)
        return (self.d_hidden_TD, *(None if tensor is None else tensor.to(dtype) for tensor in sums))


def _fp32_zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where the total may have a wider dtype."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
