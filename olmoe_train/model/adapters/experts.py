"""LoRA and DoRA on the experts: each expert has its own A and B, whatever the layout (formulas: spec.py).

The adapter multiplies the same sorted rows as the base, grouped by expert as the base is. No tensor has the
size of the experts' weights.

Shapes: N inputs, J experts per input, R sorted rows, D hidden, F expert width, H gate and up together (2 F),
E experts of this rank, L rank of the adapter; I and O are the two widths of one of the weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from olmoe_train.model.adapters.linear import add_parameters, gain, row_norms
from olmoe_train.model.adapters.nf4 import Nf4Weight
from olmoe_train.model.adapters.spec import AdapterSpec
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.moe.experts import (
    Groups,
    OlmoeExperts,
    Routing,
    group_rows,
    grouped_matmul,
    grouped_weight_grad,
    sorted_gradients,
    sorted_weights,
    sum_rows,
    unsort_weights,
)

Weight = Tensor | Nf4Weight
"""A frozen weight [E, O, I]."""


class LoraExperts(OlmoeExperts):
    """Frozen experts with an adapter. The base weights keep their names, unless they are quantized."""

    gate_up_lora_A: nn.Parameter
    gate_up_lora_B: nn.Parameter
    gate_up_magnitude: nn.Parameter | None
    down_lora_A: nn.Parameter
    down_lora_B: nn.Parameter
    down_magnitude: nn.Parameter | None
    gate_up_nf4: Nf4Weight | None
    down_nf4: Nf4Weight | None
    enabled: bool = True
    """False: the experts compute what their base computes (add.adapter_off)."""

    def __init__(self, config: OlmoeConfig, base: OlmoeExperts, spec: AdapterSpec) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.gate_up_proj, self.down_proj, self.backend = base.gate_up_proj, base.down_proj, base.backend
        self.scale, self.dropout = spec.scale, spec.dropout
        for name in ("gate_up", "down"):
            weight = getattr(self, f"{name}_proj")
            add_parameters(self, spec, f"{name}_", tuple(weight.shape), weight.device)
        self.gate_up_nf4 = self.down_nf4 = None

    def forward(self, x_ND: Tensor, weights_NJ: Tensor | None, routing: Routing) -> Tensor:
        """As OlmoeExperts.forward."""
        gate_up = self._base(self.gate_up_proj, self.gate_up_nf4)
        down = self._base(self.down_proj, self.down_nf4)
        grouped = False  # quantized experts are multiplied one by one
        if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
            grouped = self._uses_grouped(x_ND, routing, gate_up, down)
        parts: list[Tensor | None] = []
        for name, weight in (("gate_up", gate_up), ("down", down)):
            a_ELI, b_EOL = (
                self.local_experts(getattr(self, f"{name}_lora_{matrix}")).to(x_ND.dtype) for matrix in "AB"
            )
            magnitude = getattr(self, f"{name}_magnitude")
            gain_EO = None
            if magnitude is not None and self.enabled:
                gain_EO = _gain(self.local_experts(magnitude), weight, a_ELI, b_EOL, self.scale).to(
                    x_ND.dtype
                )
            if grouped:
                a_ELI, b_EOL = pad_rank(a_ELI, b_EOL)
            parts += [a_ELI, b_EOL, gain_EO]
        dropout = Dropout.draw(self.dropout if self.training and self.enabled else 0.0)
        scale = self.scale if self.enabled else 0.0  # adds exactly 0, also to quantized experts
        return _LoraExperts.apply(
            x_ND, weights_NJ, *parts, gate_up, down, routing, self, grouped, scale, dropout
        )

    def _base(self, weight: Tensor | None, quantized: Nf4Weight | None) -> Weight:
        if quantized is not None:
            return quantized  # holds this rank's experts
        assert weight is not None
        return self.local_experts(weight)


def _gain(magnitude_EO: Tensor, weight: Weight, a_ELI: Tensor, b_EOL: Tensor, scale: float) -> Tensor:
    """`gain` of stacked experts; a quantized weight is dequantized one expert at a time."""
    if isinstance(weight, Tensor):
        return gain(magnitude_EO, weight, a_ELI, b_EOL, scale)
    norms = [
        row_norms(weight.dequantize(torch.float32, expert), a_ELI[expert], b_EOL[expert], scale)
        for expert in range(len(a_ELI))
    ]
    return magnitude_EO / torch.stack(norms)


def pad_rank(a_ELI: Tensor, b_EOL: Tensor) -> tuple[Tensor, Tensor]:
    """Pad the rank with zeros to a multiple of 16 bytes, which F.grouped_mm requires of every row."""
    missing = -a_ELI.shape[1] % (16 // a_ELI.dtype.itemsize)
    if missing == 0:  # F.pad would copy
        return a_ELI, b_EOL
    return F.pad(a_ELI, (0, 0, 0, missing)), F.pad(b_EOL, (0, missing))


@dataclass(frozen=True)
class Dropout:
    """Dropout of the inputs of both adapters. Backward draws the same numbers again, so none are saved."""

    probability: float
    seeds: tuple[int, int]
    """Of the generator, for gate_up and for down."""

    @classmethod
    def draw(cls, probability: float) -> "Dropout":
        """Draw the seeds from torch's CPU generator, so that the host does not wait for the device."""
        if probability == 0:
            return cls(0.0, (0, 0))
        first, second = torch.randint(2**62, (2,)).tolist()
        return cls(probability, (first, second))

    def __call__(self, rows: Tensor, which: int) -> Tensor:
        """Drop elements of `rows`; `which` is 0 for gate_up and 1 for down."""
        if self.probability == 0:
            return rows
        generator = torch.Generator(rows.device).manual_seed(self.seeds[which])
        keep = torch.empty_like(rows).bernoulli_(1 - self.probability, generator=generator)
        return rows * keep.div_(1 - self.probability)


class _LoraExperts(torch.autograd.Function):
    """Saves the input and the pre-activations, as the function of the base does (moe/experts.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NJ: Tensor | None,
        a1_ELD: Tensor,
        b1_EHL: Tensor,
        gain1_EH: Tensor | None,
        a2_ELF: Tensor,
        b2_EDL: Tensor,
        gain2_ED: Tensor | None,
        gate_up: Weight,
        down: Weight,
        routing: Routing,
        experts: LoraExperts,
        grouped: bool,
        scale: float,
        dropout: Dropout,
    ) -> Tensor:
        routing, groups = group_rows(x_ND, routing, grouped)
        x_RD = x_ND.index_select(0, routing.token_R)
        raw_RH = _multiply(x_RD, gate_up, groups)
        low_RL = grouped_matmul(dropout(x_RD, 0), a1_ELD.transpose(1, 2), groups) * scale
        del x_RD
        _add_matmul(raw_RH, low_RL, b1_EHL.transpose(1, 2), groups)
        gated_RF = experts.gated(experts.activation, scale_rows(raw_RH, gain1_EH, groups))
        out_RD = _multiply(gated_RF, down, groups)
        low_RL = grouped_matmul(dropout(gated_RF, 1), a2_ELF.transpose(1, 2), groups) * scale
        _add_matmul(out_RD, low_RL, b2_EDL.transpose(1, 2), groups)
        ctx.save_for_backward(x_ND, weights_NJ, a1_ELD, b1_EHL, gain1_EH, a2_ELF, b2_EDL, gain2_ED, raw_RH)
        ctx.base = (gate_up, down)
        ctx.call = (routing, experts, groups, scale, dropout)
        return sum_rows(scale_rows(out_RD, gain2_ED, groups), routing, weights_NJ)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NJ, a1_ELD, b1_EHL, gain1_EH, a2_ELF, b2_EDL, gain2_ED, raw_RH = ctx.saved_tensors
        (gate_up, down), (routing, experts, groups, scale, dropout) = ctx.base, ctx.call
        d_out_RD = sorted_gradients(d_out_ND, routing)
        weight_R = None if weights_NJ is None else sorted_weights(weights_NJ, routing, x_ND.dtype)

        # down
        d_raw_RD = scale_rows(d_out_RD, gain2_ED, groups)
        d_low_RL = grouped_matmul(d_raw_RD, b2_EDL, groups) * scale
        d_gated_RF = _multiply(d_raw_RD, down, groups, transposed=True)
        d_gated_RF += dropout(grouped_matmul(d_low_RL, a2_ELF, groups), 1)
        weighted_RF, d_weight_R, d_gate_up_RH = experts.gated_backward(
            experts.activation, scale_rows(raw_RH, gain1_EH, groups), d_gated_RF, weight_R
        )
        del d_gated_RF
        dropped_RF = dropout(weighted_RF, 1)
        low_RL = grouped_matmul(dropped_RF, a2_ELF.transpose(1, 2), groups) * scale
        d_b2_EDL = grouped_weight_grad(d_raw_RD, low_RL, groups)
        d_a2_ELF = grouped_weight_grad(d_low_RL, dropped_RF, groups)
        d_gain2_ED = None
        if gain2_ED is not None:
            weighted_RD = _multiply(weighted_RF, down, groups)
            _add_matmul(weighted_RD, low_RL, b2_EDL.transpose(1, 2), groups)
            d_gain2_ED = sum_by_expert(weighted_RD.mul_(d_out_RD), groups)
        del d_out_RD, d_raw_RD, weighted_RF, dropped_RF

        # gate and up
        d_gain1_EH = None
        if gain1_EH is not None:
            d_gain1_EH = sum_by_expert(d_gate_up_RH * raw_RH, groups)
        d_raw_RH = scale_rows(d_gate_up_RH, gain1_EH, groups)
        d_low_RL = grouped_matmul(d_raw_RH, b1_EHL, groups) * scale
        dropped_RD = dropout(x_ND.index_select(0, routing.token_R), 0)
        low_RL = grouped_matmul(dropped_RD, a1_ELD.transpose(1, 2), groups) * scale
        d_b1_EHL = grouped_weight_grad(d_raw_RH, low_RL, groups)
        d_a1_ELD = grouped_weight_grad(d_low_RL, dropped_RD, groups)
        del dropped_RD
        d_x_ND = None
        if ctx.needs_input_grad[0]:
            d_x_RD = _multiply(d_raw_RH, gate_up, groups, transposed=True)
            d_x_RD += dropout(grouped_matmul(d_low_RL, a1_ELD, groups), 0)
            d_x_ND = sum_rows(d_x_RD, routing)
        d_weights_NJ = None
        if weights_NJ is not None:
            d_weights_NJ = unsort_weights(d_weight_R, routing).to(weights_NJ.dtype)
        gradients = (d_a1_ELD, d_b1_EHL, d_gain1_EH, d_a2_ELF, d_b2_EDL, d_gain2_ED)
        return d_x_ND, d_weights_NJ, *gradients, *(None,) * 7


def _multiply(rows: Tensor, weight: Weight, groups: Groups, transposed: bool = False) -> Tensor:
    """Multiply rows [R, I] with W.T of their expert -> [R, O]; transposed: rows [R, O] with W -> [R, I]."""
    if isinstance(weight, Tensor):
        return grouped_matmul(rows, weight if transposed else weight.transpose(1, 2), groups)
    assert isinstance(groups, list), "quantized experts are multiplied one by one"
    out = rows.new_empty(len(rows), weight.shape[2 if transposed else 1])
    for expert, (of_expert, result) in enumerate(zip(rows.split(groups), out.split(groups), strict=True)):
        if len(of_expert):
            matrix = weight.dequantize(rows.dtype, expert)
            torch.mm(of_expert, matrix if transposed else matrix.t(), out=result)
    return out


def _add_matmul(out_RO: Tensor, rows_RI: Tensor, weight_EIO: Tensor, groups: Groups) -> None:
    """out_RO += grouped_matmul(rows_RI, weight_EIO), on the CPU without a temporary of that size."""
    if isinstance(groups, Tensor):
        out_RO += F.grouped_mm(rows_RI, weight_EIO, offs=groups)
        return
    for expert, (out, rows) in enumerate(zip(out_RO.split(groups), rows_RI.split(groups), strict=True)):
        out.addmm_(rows, weight_EIO[expert])


def scale_rows(rows_RO: Tensor, gain_EO: Tensor | None, groups: Groups) -> Tensor:
    """Multiply each row with the factors of its expert; None returns the rows themselves."""
    if gain_EO is None:
        return rows_RO
    if isinstance(groups, Tensor):
        arange_R = torch.arange(len(rows_RO), dtype=groups.dtype, device=groups.device)
        return rows_RO * gain_EO[torch.searchsorted(groups, arange_R, right=True)]
    counts_E = torch.tensor(groups, device=rows_RO.device)
    return rows_RO * gain_EO.repeat_interleave(counts_E, dim=0, output_size=len(rows_RO))


def sum_by_expert(rows_RO: Tensor, groups: Groups) -> Tensor:
    """Sum the rows of each expert, accumulated in fp32: [R, O] -> [E, O]."""
    if isinstance(groups, Tensor):
        # A product with ones: its order of summation is fixed, that of index_add_ on CUDA is not.
        ones_RX = rows_RO.new_ones(len(rows_RO), 16 // rows_RO.dtype.itemsize)
        return F.grouped_mm(ones_RX.t(), rows_RO, offs=groups)[:, 0]
    exact = torch.promote_types(rows_RO.dtype, torch.float32)
    return torch.stack([rows.sum(0, dtype=exact) for rows in rows_RO.split(groups)]).to(rows_RO.dtype)
