"""The mixture-of-experts block: router, dispatch, experts, combine.

Shapes: B batch, S sequence, T tokens (B x S), D hidden, F expert width, E experts, K top-k, R rows (T x K
token copies).

Dropless token-choice routing (arXiv 2409.02060, section 2): softmax over all experts, the K largest
probabilities weigh their experts' outputs. Tokens are sorted by expert once; each expert then multiplies one
contiguous block of rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from olmoe_train.model.activations import ACTIVATIONS
from olmoe_train.model.configuration import OlmoeConfig


@dataclass(frozen=True)
class Routing:
    """Where rows came from and go back to, for one dispatch on one rank."""

    token_R: Tensor
    """int64 [R]: the token that each sorted row copies."""
    choice_R: Tensor
    """int64 [R]: the flat (token, choice) index, token x K + choice, of each sorted row."""
    row_TK: Tensor
    """int64 [T, K]: the sorted row of each (token, choice); the inverse of choice_R."""
    counts_E: Tensor
    """int64 [E]: rows of each expert, in row order."""
    exchange: Any = None
    """What expert parallelism needs to send the rows back (distributed/expert_parallel.py); None on one
    rank."""


Dispatch = Callable[..., tuple[Tensor, Tensor, Routing]]
Combine = Callable[[Tensor, Tensor, Routing], Tensor]
Choose = Callable[[Tensor, int], Tensor]


def sort_by_expert(expert_indices_TK: Tensor, num_experts: int) -> Routing:
    """Group the T x K (token, choice) pairs by expert, tokens in order inside an expert. No host sync."""
    flat_R = expert_indices_TK.reshape(-1)
    choice_R = flat_R.argsort(stable=True)
    row_R = torch.empty_like(choice_R)
    row_R[choice_R] = torch.arange(flat_R.numel(), device=flat_R.device)
    counts_E = torch.zeros(num_experts, dtype=torch.long, device=flat_R.device)
    counts_E.scatter_add_(0, flat_R, torch.ones_like(flat_R))
    top_k = expert_indices_TK.shape[1]
    return Routing(choice_R // top_k, choice_R, row_R.view_as(expert_indices_TK), counts_E)


def dispatch_local(
    x_TD: Tensor, expert_indices_TK: Tensor, num_experts: int, routing: Routing | None = None
) -> tuple[Tensor, Tensor, Routing]:
    """(rows_RD sorted by expert, rows of each expert [E], routing), all experts being on this rank.

    routing: of an earlier pass of the same tokens, to go the same way again.
    """
    routing = routing or sort_by_expert(expert_indices_TK, num_experts)
    return copy_rows(x_TD, routing), routing.counts_E, routing


def combine_local(rows_RD: Tensor, weights_TK: Tensor, routing: Routing) -> Tensor:
    """out_TD = sum over the K choices of weight x expert output."""
    rows_TKD = _Unsort.apply(rows_RD, routing.choice_R, routing.row_TK)
    return torch.bmm(weights_TK.to(rows_RD.dtype).unsqueeze(1), rows_TKD).squeeze(1)


def copy_rows(x_TD: Tensor, routing: Routing) -> Tensor:
    """rows_RD: each token's vector once for every expert it chose, sorted by expert."""
    return _CopyRows.apply(x_TD, routing.token_R, routing.row_TK)


class _CopyRows(torch.autograd.Function):
    """index_select whose backward gathers and sums K rows a token; autograd's own scatters with atomics,
    slower and in an order that changes from run to run on CUDA."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, token_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_rows_RD: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return d_rows_RD.index_select(0, row_TK.view(-1)).view(*row_TK.shape, -1).sum(1), None, None


class _Unsort(torch.autograd.Function):
    """rows_RD -> rows_TKD by token and choice; a permutation, so backward is the inverse gather."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_RD: Tensor, choice_R: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(choice_R)
        return rows_RD.index_select(0, row_TK.view(-1)).view(*row_TK.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_rows_TKD: Tensor) -> tuple[Tensor, None, None]:
        (choice_R,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return d_rows_TKD.flatten(0, 1).index_select(0, choice_R), None, None


def choose_top_k(probs_TE: Tensor, top_k: int) -> Tensor:
    """expert_indices_TK int64: each token's most probable experts, the first one first."""
    return probs_TE.topk(top_k, dim=-1).indices


class OlmoeTopKRouter(nn.Module):
    """Token-choice router; all of it in fp32. `choose` is a plain function; activation checkpointing replays
    what it returned."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.choose: Choose = choose_top_k
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits_TE fp32, weights_TK fp32, expert_indices_TK int64)."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        probs_TE = logits_TE.softmax(-1)
        indices_TK = self.choose(probs_TE.detach(), self.top_k)
        weights_TK = probs_TE.gather(1, indices_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK, indices_TK


def all_experts(weight: Tensor) -> Tensor:
    """The experts of this rank among those of the parameter."""
    return weight


class OlmoeExperts(nn.Module):
    """E gated MLPs: down(act(gate(x)) * up(x)), weights stacked on the expert dimension, gate and up
    fused. `own` is a plain function: expert parallelism hands in one that picks this rank's experts."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.activation = ACTIVATIONS[config.hidden_act]
        self.backend = "auto"
        self.own: Callable[[Tensor], Tensor] = all_experts

    def forward(self, rows_RD: Tensor, counts_E: Tensor) -> Tensor:
        """rows_RD: grouped by expert, counts_E rows each (int64, on the device). Returns [R, D]."""
        gate_up_EHD, down_EDF = self.own(self.gate_up_proj), self.own(self.down_proj)
        grouped = rows_RD.device.type != "cpu" if self.backend == "auto" else self.backend == "grouped_mm"
        matmul = _grouped_matmul if grouped else _loop_matmul
        gate_RF, up_RF = matmul(rows_RD, gate_up_EHD, counts_E).chunk(2, dim=-1)
        return matmul(self.activation(gate_RF) * up_RF, down_EDF, counts_E)


def _grouped_matmul(rows_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """One kernel for all experts; the group borders stay on the device."""
    return F.grouped_mm(rows_RI, weight_EOI.transpose(1, 2), offs=counts_E.cumsum(0).to(torch.int32))


def _loop_matmul(rows_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """One matmul an expert: any dtype and shape, within 3 to 19% of grouped_mm's time on CPU, which asks
    for strides of 16 bytes and breaks torch.compile in fp32 (benchmarks/RESULTS.md). Reads the counts: a
    sync on CUDA.
    """
    pairs = zip(rows_RI.split(counts_E.tolist()), weight_EOI.unbind(0), strict=True)
    # Decoding one token leaves most experts idle. In training an idle one takes part, to have a zero
    # gradient: FSDP waits for every rank's.
    skip_idle = len(rows_RI) > 0 and not torch.is_grad_enabled()
    return torch.cat([F.linear(rows, weight) for rows, weight in pairs if len(rows) or not skip_idle])


class OlmoeSparseMoeBlock(nn.Module):
    """Router and experts. `dispatch` and `combine` are plain functions; distributed/parallelize.py hands in
    the expert-parallel pair."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.gate = OlmoeTopKRouter(config)
        self.experts = OlmoeExperts(config)
        self.dispatch: Dispatch = dispatch_local
        self.combine: Combine = combine_local

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output [B, S, D], router logits_TE fp32, expert_indices_TK int64)."""
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        logits_TE, weights_TK, indices_TK = self.gate(x_TD)
        rows_RD, counts_E, routing = self.dispatch(x_TD, indices_TK, self.num_experts)
        rows_RD = self.experts(rows_RD, counts_E)
        out_TD = self.combine(rows_RD, weights_TK, routing)
        return out_TD.view_as(x_BSD), logits_TE, indices_TK
