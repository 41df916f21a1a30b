"""Expert parallelism: dispatch token rows to the ranks that hold their experts, and combine the results.

Expert parallelism over P ranks puts experts r E/P ... (r + 1) E/P - 1 on rank r. Every rank has different
tokens. `dispatch` and `combine` replace dispatch_local and combine_local of model/moe/block.py and give the
same result. Between the two calls, a rank computes the rows that all P ranks sent to its experts.

Shapes: T tokens, D hidden, E experts, K top-k, P ranks of the group, Q = E/P experts per rank, R rows that a
rank sends (T x K), N rows that a rank receives (0 to P x R).
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
from olmoe_train.model.adapters.nf4 import Nf4Weight
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.model.moe.experts import (
    OlmoeExperts,
    Routing,
    exclusive_sum,
    sort_by_expert,
    sorted_weights,
    sum_rows,
    unsort_weights,
)


@dataclass(frozen=True)
class Exchange:
    """Record of the rows of one dispatch, with which `combine` returns the results."""

    sent: list[int]
    """Rows sent to each of the P ranks; the sum is R."""
    received: list[int]
    """Rows received from each of the P ranks; the sum is N."""
    local_routing: Routing
    """Routing that sorted this rank's tokens before they were sent."""


def apply_expert_parallelism(model: OlmoeForCausalLM, mesh: DeviceMesh) -> None:
    """Shard the experts of each layer over the ranks of a mesh, in place.

    The parameters of the experts become DTensors with placement Shard(0).

    Args:
        model: The model, before activation checkpointing, torch.compile and FSDP2.
        mesh: One-dimensional mesh of P ranks; P divides E.
    """
    group = mesh.get_group()
    for layer in model.decoder_layers:
        for name, parameter in list(layer.mlp.experts.named_parameters(recurse=False)):
            # src_data_rank=None: each rank takes its shard from its local tensor, without communication.
            part = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            layer.mlp.experts.register_parameter(name, nn.Parameter(part, parameter.requires_grad))
        keep_quantized_experts(layer.mlp.experts, mesh.get_local_rank(), mesh.size())
        layer.mlp.experts.local_experts = local_tensor
        exchange_tokens(layer.mlp, group)


def keep_quantized_experts(experts: OlmoeExperts, rank: int, size: int) -> None:
    """Keep this rank's part of quantized experts, in place. They are buffers, which no mesh shards."""
    for weight in experts.children():
        if isinstance(weight, Nf4Weight):
            count = weight.shape[0] // size
            weight.keep_experts(rank * count, count)


def exchange_tokens(block: OlmoeSparseMoeBlock, group: dist.ProcessGroup) -> None:
    """Make a block exchange tokens with the ranks of `group`, which hold the experts, in place."""
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
    """Send each token to the ranks that hold its experts.

    Args:
        x_TD: This rank's tokens.
        weights_TK: Routing weights; not sent, because `combine` applies them on the token's rank.
        expert_indices_TK: int64, the experts of each token.
        num_experts: E.
        group: The P ranks.
        routing: Routing of an earlier pass over the same tokens, to be reused without exchanging counts; None
            computes the routing.

    Returns:
        (rows_ND received for this rank's experts, sorted by sending rank; None instead of weights; routing
        of the received rows).
    """
    routing = routing or plan_exchange(expert_indices_TK, num_experts, group)
    exchange: Exchange = routing.exchange
    rows_RD = _CopyRows.apply(x_TD, exchange.local_routing)
    return _ExchangeRows.apply(rows_RD, exchange.received, exchange.sent, group), None, routing


def plan_exchange(expert_indices_TK: Tensor, num_experts: int, group: dist.ProcessGroup) -> Routing:
    """Exchange row counts with the other ranks of `group` and plan the exchange of rows.

    Args:
        expert_indices_TK: int64, the experts of each of this rank's tokens.
        num_experts: E.
        group: The P ranks.

    Returns:
        Routing of the N rows that this rank will receive; `exchange` is set.
    """
    local_routing = sort_by_expert(expert_indices_TK, num_experts)
    sent_PQ = local_routing.counts_E.view(group.size(), -1)
    received_PQ = _all_to_all(sent_PQ, None, None, group)
    # The only host sync per layer. The all-to-all of rows allocates its output, and NCCL takes the number of
    # rows per rank, sent and received, as host integers. One copy transfers both lists.
    sent, received = torch.stack([sent_PQ.sum(1), received_PQ.sum(1)]).tolist()
    source_N, position_N = _sort_arrivals(received_PQ, sum(received))
    exchange = Exchange(sent, received, local_routing)
    return Routing(source_N, source_N, position_N[:, None], received_PQ.sum(0), exchange=exchange)


def combine(out_ND: Tensor, weights_TK: Tensor, routing: Routing, *, group: dist.ProcessGroup) -> Tensor:
    """Return the experts' outputs to the ranks of the tokens, and sum them per token.

    Args:
        out_ND: Outputs for the rows that this rank received, in the order of `dispatch`.
        weights_TK: Routing weights of this rank's tokens.
        routing: Routing that `dispatch` returned.
        group: The P ranks.

    Returns:
        out_TD: weighted sums for this rank's tokens.
    """
    exchange: Exchange = routing.exchange
    rows_RD = _ExchangeRows.apply(out_ND, exchange.sent, exchange.received, group)
    return _WeighAndSum.apply(rows_RD, weights_TK, exchange.local_routing)


def _sort_arrivals(received_PQ: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Map the order of arrival (by sender, then expert) to the experts' order (by expert, then sender).

    Each (sender, expert) block moves as a whole. The function therefore computes only one shift per block,
    without a sort and without a host sync.

    Args:
        received_PQ: int64, rows received per sender and expert.
        total: N, the sum of `received_PQ`.

    Returns:
        source_N, int64: position of arrival of each sorted row; position_N, int64: sorted position of each
        received row.
    """
    ranks, experts = received_PQ.shape
    starts_PQ = exclusive_sum(received_PQ.reshape(-1)).view(ranks, experts)
    targets_PQ = exclusive_sum(received_PQ.t().reshape(-1)).view(experts, ranks).t()
    shifts = (targets_PQ - starts_PQ).reshape(-1)
    arange_N = torch.arange(total, device=received_PQ.device)
    position_N = arange_N + shifts.repeat_interleave(received_PQ.reshape(-1), output_size=total)
    source_N = torch.empty_like(position_N)
    source_N[position_N] = arange_N
    return source_N, position_N


def _all_to_all(
    rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup
) -> Tensor:
    """Send consecutive blocks of `rows` to the ranks of `group`, in rank order.

    `sent` and `received` are rows per rank; None: the same number of rows for every rank.
    """
    arrived = rows.new_empty(sum(received) if received is not None else len(rows), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group)
    return arrived


class _ExchangeRows(torch.autograd.Function):
    """All-to-all of rows; backward sends each gradient to the rank that sent the row."""

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
    """rows_RD: one copy of each token per chosen expert, sorted by expert.

    Backward gathers and sums. Autograd would scatter instead, on CUDA with atomics, whose order of summation
    changes from run to run.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, local_routing: Routing) -> Tensor:
        ctx.local_routing = local_routing  # type: ignore[attr-defined]
        return x_TD.index_select(0, local_routing.token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_rows_RD: Tensor) -> tuple[Tensor, None]:
        return sum_rows(d_rows_RD, ctx.local_routing), None  # type: ignore[attr-defined]


class _WeighAndSum(torch.autograd.Function):
    """out_TD = sum over the K choices of weight x row."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows_RD: Tensor, weights_TK: Tensor, local_routing: Routing) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_TK)
        ctx.local_routing = local_routing  # type: ignore[attr-defined]
        return sum_rows(rows_RD, local_routing, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weights_TK = ctx.saved_tensors  # type: ignore[attr-defined]
        local_routing: Routing = ctx.local_routing  # type: ignore[attr-defined]
        d_rows_RD = d_out_TD.index_select(0, local_routing.token_R)
        d_weights_R = (d_rows_RD * rows_RD).sum(-1, dtype=torch.float32)
        d_rows_RD *= sorted_weights(weights_TK, local_routing, d_rows_RD.dtype)[:, None]
        return d_rows_RD, unsort_weights(d_weights_R, local_routing).to(weights_TK.dtype), None
