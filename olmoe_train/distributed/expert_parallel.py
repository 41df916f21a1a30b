"""Sending token rows to the ranks that hold their experts, and back.

Expert parallelism over P ranks puts experts r E/P ... (r + 1) E/P - 1 on rank r. Every rank has tokens of its
own. `dispatch` and `combine` stand in for model/moe.py's local pair and give the same result; in between, a
rank computes its experts' rows from all P ranks.

Shapes: T tokens, D hidden, E experts, K top-k, P ranks of the group, Q = E/P experts of a rank, R rows that a
rank sends (T x K), N rows that it receives: anything from 0 to P x R.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe import OlmoeSparseMoeBlock, Routing, combine_local, copy_rows, sort_by_expert
from olmoe_train.model.transformer import OlmoeDecoderLayer


@dataclass(frozen=True)
class Exchange:
    """How the rows of one dispatch travelled, for sending the results back."""

    sent: list[int]
    """Rows sent to each of the P ranks; sums to R."""
    received: list[int]
    """Rows received from each of them; sums to N."""
    counts_Q: Tensor
    """int64 [Q]: rows received for each expert of this rank."""
    arrival_N: Tensor
    """int64 [N]: as the how-manieth it arrived, for each row sorted by expert."""
    place_N: Tensor
    """int64 [N]: where it is sorted to, for each row as it arrived; the inverse of arrival_N."""


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
    expert_indices_TK: Tensor,
    num_experts: int,
    *,
    group: dist.ProcessGroup,
    routing: Routing | None = None,
) -> tuple[Tensor, Tensor, Routing]:
    """(rows_ND for this rank's experts from all ranks, by expert; rows of each, counts_Q; routing).

    routing: of an earlier pass of these tokens, to send them the same way again without asking.
    """
    routing = routing or plan_exchange(expert_indices_TK, num_experts, group)
    exchange: Exchange = routing.exchange
    rows_ND = _ExchangeRows.apply(copy_rows(x_TD, routing), exchange.received, exchange.sent, group)
    rows_ND = _Permute.apply(rows_ND, exchange.arrival_N, exchange.place_N)
    return rows_ND, exchange.counts_Q, routing


def plan_exchange(expert_indices_TK: Tensor, num_experts: int, group: dist.ProcessGroup) -> Routing:
    """Where this rank's rows go, and, after asking the other ranks, what comes from them."""
    routing = sort_by_expert(expert_indices_TK, num_experts)
    sent_PQ = routing.counts_E.view(group.size(), -1)
    received_PQ = _all_to_all(sent_PQ, None, None, group)
    # The one host sync of a layer: the all-to-all of rows allocates its output, and NCCL takes what goes to
    # each rank and comes from it as host integers. Both in one copy.
    sent, received = torch.stack([sent_PQ.sum(1), received_PQ.sum(1)]).tolist()
    arrival_N, place_N = _sort_arrivals(received_PQ, sum(received))
    return replace(routing, exchange=Exchange(sent, received, received_PQ.sum(0), arrival_N, place_N))


def combine(rows_ND: Tensor, weights_TK: Tensor, routing: Routing, *, group: dist.ProcessGroup) -> Tensor:
    """out_TD of this rank's tokens, from the experts' results on all ranks."""
    exchange: Exchange = routing.exchange
    rows_ND = _Permute.apply(rows_ND, exchange.place_N, exchange.arrival_N)
    rows_RD = _ExchangeRows.apply(rows_ND, exchange.sent, exchange.received, group)
    return combine_local(rows_RD, weights_TK, routing)


def _sort_arrivals(received_PQ: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(arrival_N, place_N). Rows arrive by sender, then expert; experts want them by expert, then sender.

    Every (sender, expert) block moves as one, so its shift is all there is to compute: no sort, no host sync.
    """
    ranks, experts = received_PQ.shape
    starts_PQ = _exclusive_sum(received_PQ.reshape(-1)).view(ranks, experts)
    targets_PQ = _exclusive_sum(received_PQ.t().reshape(-1)).view(experts, ranks).t()
    shifts = (targets_PQ - starts_PQ).reshape(-1)
    arange_N = torch.arange(total, device=received_PQ.device)
    place_N = arange_N + shifts.repeat_interleave(received_PQ.reshape(-1), output_size=total)
    arrival_N = torch.empty_like(place_N)
    arrival_N[place_N] = arange_N
    return arrival_N, place_N


def _exclusive_sum(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


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


class _Permute(torch.autograd.Function):
    """rows[order]; backward gathers with the inverse where autograd would scatter, on CUDA with atomics."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_rows: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return d_rows.index_select(0, inverse), None, None
