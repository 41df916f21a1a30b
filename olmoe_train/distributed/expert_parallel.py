"""Sending token rows to the ranks that hold their experts, and back.

Expert parallelism over P ranks puts experts r E/P ... (r + 1) E/P - 1 on rank r. Every rank has tokens of its
own. `dispatch` and `combine` stand in for the local pair of model/moe/block.py and give the same result; in
between, a rank computes its experts' rows from all P ranks.

Shapes: T tokens, D hidden, E experts, K top-k, P ranks of the group, Q = E/P experts of a rank, R rows that a
rank sends (T x K), N rows that it receives: anything from 0 to P x R.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.model.moe.experts import (
    Routing,
    exclusive_sum,
    sort_by_expert,
    sorted_weights,
    sum_rows,
    unsort_weights,
)
from olmoe_train.model.transformer import OlmoeDecoderLayer


@dataclass(frozen=True)
class Exchange:
    """How the rows of one dispatch travelled, for sending the results back."""

    sent: list[int]
    """Rows sent to each of the P ranks; sums to R."""
    received: list[int]
    """Rows received from each of them; sums to N."""
    home: Routing
    """How this rank's own tokens were sorted before they left."""


def apply_expert_parallelism(model: OlmoeForCausalLM, mesh: DeviceMesh) -> None:
    """Split the experts of each layer over a one-dimensional mesh: parameters become DTensors, Shard(0)."""
    group = mesh.get_group()
    for layer in model.model.layers:
        assert isinstance(layer, OlmoeDecoderLayer)
        for name, parameter in list(layer.mlp.experts.named_parameters(recurse=False)):
            # src_data_rank=None: each rank cuts its part out of what it has; nothing is sent.
            part = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            layer.mlp.experts.register_parameter(name, nn.Parameter(part))
        layer.mlp.experts.own = local_tensor
        exchange_tokens(layer.mlp, group)


def exchange_tokens(block: OlmoeSparseMoeBlock, group: dist.ProcessGroup) -> None:
    """Send a block's tokens to the ranks of `group` that hold their experts, instead of keeping them here."""
    block.dispatch = partial(dispatch, group=group)
    block.combine = partial(combine, group=group)


def dispatch(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_indices_TK: Tensor,
    num_experts: int,
    *,
    group: dist.ProcessGroup,
    routing: Routing | None = None,
) -> tuple[Tensor, None, Routing]:
    """(rows_ND for this rank's experts, as they arrived from all ranks; None, for the weights stay at home;
    routing of the arrived rows).

    routing: of an earlier pass of these tokens, to send them the same way again without asking.
    """
    routing = routing or plan_exchange(expert_indices_TK, num_experts, group)
    exchange: Exchange = routing.exchange
    rows_RD = _CopyRows.apply(x_TD, exchange.home)
    return _ExchangeRows.apply(rows_RD, exchange.received, exchange.sent, group), None, routing


def plan_exchange(expert_indices_TK: Tensor, num_experts: int, group: dist.ProcessGroup) -> Routing:
    """Where this rank's rows go, and, after asking the other ranks, what comes from them."""
    home = sort_by_expert(expert_indices_TK, num_experts)
    sent_PQ = home.counts_E.view(group.size(), -1)
    received_PQ = _all_to_all(sent_PQ, None, None, group)
    # The one host sync of a layer: the all-to-all of rows allocates its output, and NCCL takes what goes to
    # each rank and comes from it as host integers. Both in one copy.
    sent, received = torch.stack([sent_PQ.sum(1), received_PQ.sum(1)]).tolist()
    arrival_N, place_N = _sort_arrivals(received_PQ, sum(received))
    exchange = Exchange(sent, received, home)
    return Routing(arrival_N, arrival_N, place_N[:, None], received_PQ.sum(0), exchange=exchange)


def combine(out_ND: Tensor, weights_TK: Tensor, routing: Routing, *, group: dist.ProcessGroup) -> Tensor:
    """out_TD of this rank's tokens, from the experts' results on all ranks."""
    exchange: Exchange = routing.exchange
    rows_RD = _ExchangeRows.apply(out_ND, exchange.sent, exchange.received, group)
    return _WeighAndSum.apply(rows_RD, weights_TK, exchange.home)


def _sort_arrivals(received_PQ: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(arrival_N, place_N). Rows arrive by sender, then expert; experts want them by expert, then sender.

    Every (sender, expert) block moves as one, so its shift is all there is to compute: no sort, no host sync.
    """
    ranks, experts = received_PQ.shape
    starts_PQ = exclusive_sum(received_PQ.reshape(-1)).view(ranks, experts)
    targets_PQ = exclusive_sum(received_PQ.t().reshape(-1)).view(experts, ranks).t()
    shifts = (targets_PQ - starts_PQ).reshape(-1)
    arange_N = torch.arange(total, device=received_PQ.device)
    place_N = arange_N + shifts.repeat_interleave(received_PQ.reshape(-1), output_size=total)
    arrival_N = torch.empty_like(place_N)
    arrival_N[place_N] = arange_N
    return arrival_N, place_N


def _all_to_all(
    rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup
) -> Tensor:
    """First-dimension blocks of `rows`, `sent` long, go to the ranks in order; None: one row to each."""
    arrived = rows.new_empty(sum(received) if received is not None else len(rows), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group)
    return arrived


class _ExchangeRows(torch.autograd.Function):
    """All-to-all of rows; backward sends the gradients the way back."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way_back = (sent, received, group)  # type: ignore[attr-defined]
        return _all_to_all(rows, received, sent, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_rows: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(d_rows, *ctx.way_back), None, None, None  # type: ignore[attr-defined]


class _CopyRows(torch.autograd.Function):
    """rows_RD: each token's vector once for every expert it chose, sorted by expert. Backward gathers and
    sums where autograd would scatter, on CUDA with atomics, in an order that changes from run to run."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, home: Routing) -> Tensor:
        ctx.home = home  # type: ignore[attr-defined]
        return x_TD.index_select(0, home.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_rows_RD: Tensor) -> tuple[Tensor, None]:
        return sum_rows(d_rows_RD, ctx.home), None  # type: ignore[attr-defined]


class _WeighAndSum(torch.autograd.Function):
    """out_TD = sum over the K choices of weight x row."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_RD: Tensor, weights_TK: Tensor, home: Routing) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK)
        ctx.home = home  # type: ignore[attr-defined]
        return sum_rows(rows_RD, home, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weights_TK = ctx.saved_tensors  # type: ignore[attr-defined]
        home: Routing = ctx.home  # type: ignore[attr-defined]
        d_rows_RD = d_out_TD.index_select(0, home.token_R)
        d_weights_R = (d_rows_RD * rows_RD).sum(-1, dtype=torch.float32)
        d_rows_RD *= sorted_weights(weights_TK, home, d_rows_RD.dtype)[:, None]
        return d_rows_RD, unsort_weights(d_weights_R, home).to(weights_TK.dtype), None
