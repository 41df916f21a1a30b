"""Forward and backward of the experts, from unsorted inputs to weighted sums.

Shapes: N inputs (tokens, or rows received from other ranks), J experts per input (K for a token, 1 for a
received row), R sorted rows (N x J, plus padding), D hidden, F expert width, H gate and up together (2 F),
E experts of this rank; I and O are any two widths.

One autograd function makes the memory of a layer independent of the number of experts that share the width.
The function saves its input and the pre-activations, D N + H R elements, and recomputes everything else in
backward. The experts' outputs are not saved: the gradient of a routing weight is the product of the down
projection's input and the gradient of that input (SonicMoE, arXiv 2512.14080, section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from olmoe_train.model.activations import ACTIVATIONS
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.sonicmoe import sonic_experts

# A bf16 matmul on a CPU needs one oneDNN primitive per number of rows, and routing changes the number of rows
# of every expert in every step. Multiples of 32 are few enough for oneDNN's cache of 1024 primitives.
CPU_ROW_MULTIPLE = 32


# Rows per expert, a list on the host; or the end of each expert's rows, int32 [E] on the device.
Groups = list[int] | Tensor


@dataclass(frozen=True)
class Routing:
    """Origin and destination of the experts' rows, for one dispatch on one rank."""

    token_R: Tensor
    """int64 [R]: index of the input that each sorted row copies."""
    choice_R: Tensor
    """int64 [R]: flat index of the (input, choice) pair of each sorted row, input x J + choice."""
    row_NJ: Tensor
    """int64 [N, J]: sorted row of each (input, choice) pair; the inverse of choice_R."""
    counts_E: Tensor
    """int64 [E]: rows per expert; the sorted rows are in the order of the experts."""
    padding: Tensor | None = None
    """int64: indices of the padding rows (pad_rows); None without padding."""
    exchange: Any = None
    """The exchange that received the inputs from other ranks (distributed/expert_parallel.py); None if the
    inputs are this rank's tokens."""


def sort_by_expert(expert_indices_NJ: Tensor, num_experts: int) -> Routing:
    """Sort the N x J (input, choice) pairs by expert, without a host sync.

    Args:
        expert_indices_NJ: int64, the experts of each input.
        num_experts: E.

    Returns:
        Routing of R = N x J rows. The rows of one expert keep the order of the inputs.
    """
    flat_R = expert_indices_NJ.reshape(-1)
    choice_R = flat_R.argsort(stable=True)
    row_R = torch.empty_like(choice_R)
    row_R[choice_R] = torch.arange(flat_R.numel(), device=flat_R.device)
    counts_E = torch.zeros(num_experts, dtype=torch.long, device=flat_R.device)
    counts_E.scatter_add_(0, flat_R, torch.ones_like(flat_R))
    return Routing(
        choice_R // expert_indices_NJ.shape[1], choice_R, row_R.view_as(expert_indices_NJ), counts_E
    )


def expert_indices(routing: Routing) -> Tensor:
    """Recover expert_indices_NJ, int64, the argument from which sort_by_expert made `routing`."""
    return torch.searchsorted(routing.counts_E.cumsum(0), routing.row_NJ, right=True)


def padding_pays(x_ND: Tensor, routing: Routing) -> bool:
    """True if padding each expert's rows is cheaper than the oneDNN set-up that the padding avoids.

    False if most rows would be padding, for example when decoding one token.
    """
    rows, experts = routing.token_R.numel(), routing.counts_E.numel()
    return x_ND.device.type == "cpu" and x_ND.dtype.itemsize == 2 and rows >= CPU_ROW_MULTIPLE * experts


def pad_rows(routing: Routing, multiple: int) -> Routing:
    """Pad the rows of each expert to a multiple of `multiple` rows. CPU only.

    Returns:
        Routing whose `padding` lists the added rows. The added rows copy input 0.
    """
    counts_E = routing.counts_E
    padded_E = (counts_E + multiple - 1) // multiple * multiple
    shift_E = exclusive_sum(padded_E) - exclusive_sum(counts_E)
    rows = routing.token_R.numel()
    row_R = torch.arange(rows) + shift_E.repeat_interleave(counts_E, output_size=rows)
    total = int(padded_E.sum())
    is_padding = torch.ones(total, dtype=torch.bool).index_fill_(0, row_R, False)
    return replace(
        routing,
        token_R=torch.zeros(total, dtype=torch.long).index_copy_(0, row_R, routing.token_R),
        choice_R=torch.zeros(total, dtype=torch.long).index_copy_(0, row_R, routing.choice_R),
        row_NJ=row_R[routing.row_NJ],
        counts_E=padded_E,
        padding=is_padding.nonzero().squeeze(1),
    )


def exclusive_sum(counts: Tensor) -> Tensor:
    """Cumulative sum along dimension 0 that excludes the current element: the start of each block."""
    return counts.cumsum(0) - counts


def gated(activation: Callable[[Tensor], Tensor], gate_up_RH: Tensor) -> Tensor:
    """Return activation(gate) x up, [R, F], for the fused pre-activations [R, H]."""
    gate_RF, up_RF = gate_up_RH.chunk(2, dim=-1)
    return activation(gate_RF) * up_RF


def gated_backward(
    activation: Callable[[Tensor], Tensor], gate_up_RH: Tensor, d_RF: Tensor, weight_R: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Backward of weight x gated(activation, gate_up).

    Args:
        activation: Activation of the gate.
        gate_up_RH: Saved pre-activations.
        d_RF: Gradient of the weighted rows.
        weight_R: Routing weight per row; None: 1 for every row.

    Returns:
        (weighted gated rows [R, F], gradient of the weights fp32 [R] or None, gradient of gate_up [R, H]).
    """
    gate_RF, up_RF = gate_up_RH.chunk(2, dim=-1)
    active_RF, pull_back, *_ = torch.func.vjp(activation, gate_RF)
    product_RF, d_weight_R = active_RF * up_RF, None
    if weight_R is not None:
        d_weight_R = (d_RF * product_RF).sum(-1, dtype=torch.float32)
        weight_R1 = weight_R.unsqueeze(1)
        d_RF, product_RF = d_RF * weight_R1, product_RF * weight_R1
    d_gate_up_RH = torch.cat((pull_back(d_RF * up_RF)[0], d_RF * active_RF), dim=-1)
    return product_RF, d_weight_R, d_gate_up_RH


def all_experts(weight: Tensor) -> Tensor:
    """Return `weight`: without expert parallelism, a rank computes all experts of the parameter."""
    return weight


class OlmoeExperts(nn.Module):
    """E gated MLPs, down(act(gate(x)) * up(x)), with weights stacked by expert and with gate and up fused.

    Three functions are attributes so that other modules can replace them. Expert parallelism replaces
    `local_experts`, which selects this rank's experts. distributed/compile.py replaces `gated` and
    `gated_backward` by compiled functions.

    frozen_E: bool, on the device of the weights, which of this rank's experts get the gradient 0. None: no
    expert does.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.activation = ACTIVATIONS[config.hidden_act]
        self.backend = "auto"
        self.local_experts: Callable[[Tensor], Tensor] = all_experts
        self.gated = gated
        self.gated_backward = gated_backward
        self.frozen_E: Tensor | None = None

    def forward(self, x_ND: Tensor, weights_NJ: Tensor | None, routing: Routing) -> Tensor:
        """For each input, sum weight x expert(input) over the experts of the input.

        Args:
            x_ND: Inputs.
            weights_NJ: Routing weights, any float dtype; None: 1 for every expert.
            routing: Routing of these inputs, from sort_by_expert.

        Returns:
            out_ND.
        """
        gate_up_EHD, down_EDF = self.local_experts(self.gate_up_proj), self.local_experts(self.down_proj)
        if self.backend == "sonicmoe":
            assert weights_NJ is not None, "refused with expert parallelism"
            return sonic_experts(x_ND, weights_NJ, expert_indices(routing), gate_up_EHD, down_EDF)
        grouped = self._uses_grouped(x_ND, routing, gate_up_EHD, down_EDF)
        return _Experts.apply(x_ND, weights_NJ, gate_up_EHD, down_EDF, routing, self, grouped)

    def _uses_grouped(self, x_ND: Tensor, routing: Routing, *weights: Tensor) -> bool:
        """True if the grouped kernel multiplies these weights, and not a loop over experts."""
        if self.backend == "auto":
            return self._grouped_is_faster(x_ND, routing) and fits_grouped_mm(*weights)
        return self.backend == "grouped_mm"

    def _grouped_is_faster(self, x_ND: Tensor, routing: Routing) -> bool:
        """True if the grouped kernel is faster than a loop over experts.

        On a CPU the grouped kernel is faster only when decoding several sequences (benchmarks/generate.py).
        """
        if x_ND.device.type != "cpu":
            return True
        rows, experts = routing.token_R.numel(), routing.counts_E.numel()
        # Use the same path for every pass of a training step: count_experts routes the batch once without
        # gradients, and the pass with gradients must route the batch identically.
        return not self.training and rows >= experts and not padding_pays(x_ND, routing)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NJ: Tensor | None,
        gate_up_EHD: Tensor,
        down_EDF: Tensor,
        routing: Routing,
        experts: OlmoeExperts,
        grouped: bool,
    ) -> Tensor:
        routing, groups = group_rows(x_ND, routing, grouped)
        x_RD = x_ND.index_select(0, routing.token_R)
        gate_up_RH = grouped_matmul(x_RD, gate_up_EHD.transpose(1, 2), groups)
        del x_RD
        gated_RF = experts.gated(experts.activation, gate_up_RH)
        out_RD = grouped_matmul(gated_RF, down_EDF.transpose(1, 2), groups)
        ctx.save_for_backward(x_ND, weights_NJ, gate_up_EHD, down_EDF, gate_up_RH)
        ctx.routing, ctx.experts, ctx.groups = routing, experts, groups
        return sum_rows(out_RD, routing, weights_NJ)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NJ, gate_up_EHD, down_EDF, gate_up_RH = ctx.saved_tensors
        routing, experts, groups = ctx.routing, ctx.experts, ctx.groups
        d_out_RD = sorted_gradients(d_out_ND, routing)
        weight_R = None
        if weights_NJ is not None:
            weight_R = sorted_weights(weights_NJ, routing, x_ND.dtype)
        d_gated_RF = grouped_matmul(d_out_RD, down_EDF, groups)
        weighted_RF, d_weight_R, d_gate_up_RH = experts.gated_backward(
            experts.activation, gate_up_RH, d_gated_RF, weight_R
        )
        d_down_EDF = d_gate_up_EHD = None
        if ctx.needs_input_grad[2]:  # not if the experts are frozen
            d_down_EDF = grouped_weight_grad(d_out_RD, weighted_RF, groups)
            x_RD = x_ND.index_select(0, routing.token_R)
            d_gate_up_EHD = grouped_weight_grad(d_gate_up_RH, x_RD, groups)
            del x_RD
            if experts.frozen_E is not None:
                for d_weight in (d_down_EDF, d_gate_up_EHD):
                    d_weight.masked_fill_(experts.frozen_E[:, None, None], 0)
        del d_out_RD, weighted_RF
        d_x_ND = sum_rows(grouped_matmul(d_gate_up_RH, gate_up_EHD, groups), routing)
        d_weights_NJ = None
        if weights_NJ is not None:
            d_weights_NJ = unsort_weights(d_weight_R, routing).to(weights_NJ.dtype)
        return d_x_ND, d_weights_NJ, d_gate_up_EHD, d_down_EDF, None, None, None


def group_rows(x_ND: Tensor, routing: Routing, grouped: bool) -> tuple[Routing, Groups]:
    """The routing, padded where that pays, and its groups in the form that the kernel reads.

    The grouped kernel reads the group ends on the device. The loop needs the counts on the host, which is a
    sync on CUDA.
    """
    if grouped:
        return routing, routing.counts_E.cumsum(0).to(torch.int32)
    if padding_pays(x_ND, routing):
        routing = pad_rows(routing, CPU_ROW_MULTIPLE)
    return routing, routing.counts_E.tolist()


def sorted_gradients(d_out_ND: Tensor, routing: Routing) -> Tensor:
    """Return d_out_RD: the gradient of the output of each sorted row's input; 0 for padding."""
    d_out_RD = d_out_ND.index_select(0, routing.token_R)
    if routing.padding is not None:
        d_out_RD.index_fill_(0, routing.padding, 0)
    return d_out_RD


def fits_grouped_mm(*weights: Tensor) -> bool:
    """True if F.grouped_mm accepts the weights: rows of a multiple of 16 bytes, and no float64."""
    return all(w.dtype != torch.float64 and w.shape[-1] * w.dtype.itemsize % 16 == 0 for w in weights)


def sum_rows(rows_RD: Tensor, routing: Routing, weights_NJ: Tensor | None = None) -> Tensor:
    """For each input, sum the sorted rows of the input, times their weights if there are weights.

    Args:
        rows_RD: Sorted rows.
        routing: Routing that sorted the rows.
        weights_NJ: Any float dtype; None: 1 for every row.

    Returns:
        out_ND in the dtype of the rows, accumulated in fp32.
    """
    if weights_NJ is not None:
        weights_NJ = weights_NJ.to(rows_RD.dtype)
    # embedding_bag gathers and sums in one pass, without an [N, J, D] tensor.
    return F.embedding_bag(routing.row_NJ, rows_RD, mode="sum", per_sample_weights=weights_NJ)


def sorted_weights(weights_NJ: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """Return weight_R in `dtype`: the routing weight of each sorted row."""
    return weights_NJ.to(dtype).view(-1).index_select(0, routing.choice_R)


def unsort_weights(weight_R: Tensor, routing: Routing) -> Tensor:
    """Return weights_NJ: the values of `weight_R` in the order of the inputs and their choices."""
    return weight_R.index_select(0, routing.row_NJ.view(-1)).view_as(routing.row_NJ)


def grouped_matmul(rows_RI: Tensor, weight_EIO: Tensor, groups: Groups) -> Tensor:
    """Multiply the rows of each expert with the matrix of that expert: [R, I] x [E, I, O] -> [R, O]."""
    if isinstance(groups, Tensor):
        return F.grouped_mm(rows_RI, weight_EIO, offs=groups)
    out_RO = rows_RI.new_empty(len(rows_RI), weight_EIO.shape[2])
    # When decoding one token most experts have no rows; skip the views of those experts.
    busy = [expert for expert, rows in enumerate(groups) if rows]
    sizes = [groups[expert] for expert in busy]
    for expert, rows, out in zip(busy, rows_RI.split(sizes), out_RO.split(sizes), strict=True):
        torch.mm(rows, weight_EIO[expert], out=out)
    return out_RO


def grouped_weight_grad(rows_RO: Tensor, rows_RI: Tensor, groups: Groups) -> Tensor:
    """Sum the outer products of the rows of each expert: [R, O] and [R, I] -> [E, O, I]."""
    if isinstance(groups, Tensor):
        return F.grouped_mm(rows_RO.t(), rows_RI, offs=groups)
    out_EOI = rows_RI.new_empty(len(groups), rows_RO.shape[1], rows_RI.shape[1])
    for left, right, out in zip(rows_RO.split(groups), rows_RI.split(groups), out_EOI.unbind(0), strict=True):
        torch.mm(left.t(), right, out=out)
    return out_EOI
