"""NF4: frozen weights in 4 bits (QLoRA, arXiv 2305.14314, section 3 and appendix E).

A block of 64 consecutive elements shares one scale, its largest absolute value (absmax, fp32). An element is
the nearest of 16 levels times that scale. The indices of two elements are packed into a byte.

The packed weights are buffers, not parameters. Every layout therefore holds them whole on each rank (with
expert parallelism: this rank's experts), and no optimizer and no checkpoint sees them.

Shapes: O and I the widths of a weight [O, I], E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Elements that share a scale."""
# Appendix E of the paper; the same values as in bitsandbytes.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize_nf4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight. Its elements are taken in row-major order.

    Args:
        weight_OI: Any float dtype; O x I is a multiple of BLOCK.

    Returns:
        Packed indices, uint8 [O I / 2], the first of two elements in the high bits; and the scales, fp32
        [O I / BLOCK].
    """
    blocks = weight_OI.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    # A block of zeros has scale 0. With 1 the division is finite, and every index is that of level 0.
    unit = blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
    levels = torch.tensor(LEVELS, device=weight_OI.device)
    boundaries = (levels[1:] + levels[:-1]) / 2
    indices = torch.bucketize(unit, boundaries).to(torch.uint8).flatten()
    return (indices[::2] << 4) | indices[1::2], absmax


def dequantize_nf4(packed: Tensor, absmax: Tensor) -> Tensor:
    """The elements that `quantize_nf4` packed, fp32 [O I]: level x scale."""
    indices = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()
    levels = torch.tensor(LEVELS, device=packed.device)
    return (levels[indices.int()].view(-1, BLOCK) * absmax[:, None]).flatten()


def round_trip_nf4(weight: Tensor) -> Tensor:
    """The values that a model with the quantized weight computes with, fp32."""
    if weight.ndim == 3:
        return torch.stack([round_trip_nf4(of_expert) for of_expert in weight])
    return dequantize_nf4(*quantize_nf4(weight)).view_as(weight)


class Nf4Weight(nn.Module):
    """A quantized weight [O, I], or [E, O, I] of stacked experts, in place of a parameter."""

    packed: Tensor
    """uint8 [O I / 2], or [E, O I / 2]."""
    absmax: Tensor
    """fp32 [O I / BLOCK], or [E, O I / BLOCK]."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        super().__init__()
        *experts, self.rows, self.width = shape
        elements = self.rows * self.width
        packed = torch.empty(*experts, elements // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(*experts, elements // BLOCK, device=device)
        # Not persistent: the base model is not part of a checkpoint.
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.first_expert = 0
        """Index of the first expert that this rank holds."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight that this rank holds."""
        return torch.Size((*self.packed.shape[:-1], self.rows, self.width))

    def reset_buffers(self) -> None:
        """Zeros, until `set_weight`."""
        self.packed.zero_()
        self.absmax.zero_()

    def set_weight(self, weight: Tensor) -> None:
        """Quantize a whole weight; of stacked experts this rank's, one at a time."""
        if weight.ndim == 2:
            packed, absmax = quantize_nf4(weight)
            self.packed.copy_(packed)
            self.absmax.copy_(absmax)
            return
        for index in range(len(self.packed)):
            packed, absmax = quantize_nf4(weight[self.first_expert + index])
            self.packed[index].copy_(packed)
            self.absmax[index].copy_(absmax)

    def keep_experts(self, first: int, count: int) -> None:
        """Keep `count` experts from `first` on, and drop the others."""
        self.packed = self.packed[first : first + count].clone()
        self.absmax = self.absmax[first : first + count].clone()
        self.first_expert += first

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The weight [O, I], of one expert if experts are stacked."""
        stored = (self.packed, self.absmax) if expert is None else (self.packed[expert], self.absmax[expert])
        return dequantize_nf4(*stored).view(self.rows, self.width).to(dtype)


class _Nf4Linear(torch.autograd.Function):
    """x @ W.T with W dequantized in forward and again in backward, so that only the 4 bits are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Nf4Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        return d_out @ ctx.weight.dequantize(d_out.dtype), None


def nf4_linear(x: Tensor, weight: Nf4Weight) -> Tensor:
    """x [..., I] @ W.T -> [..., O] for a frozen quantized weight."""
    return _Nf4Linear.apply(x, weight)
