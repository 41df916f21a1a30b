"""LoRA and DoRA on the projections, the head and the embedding (formulas: spec.py).

Shapes: O and I the widths of a weight [O, I], R rank of the adapter, E experts, T tokens, D hidden,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.adapters.nf4 import Nf4Weight, nf4_linear
from olmoe_train.model.adapters.spec import AdapterSpec
from olmoe_train.model.configuration import OlmoeConfig
from olmoe_train.model.cross_entropy import HeadAdapter, cross_entropy_sum, target_log_probs_of
from olmoe_train.model.head import OlmoeHead


class LoraLinear(nn.Linear):
    """A frozen projection with an adapter. The base weight keeps its name, unless it is quantized."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    nf4: Nf4Weight | None
    enabled: bool = True
    """False: the module computes what its base computes (add.adapter_off)."""

    def __init__(self, base: nn.Linear, spec: AdapterSpec) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = spec.scale, spec.dropout
        add_parameters(self, spec, "", (base.out_features, base.in_features), base.weight.device)
        self.nf4 = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name in nn.Linear
        weight = self.weight if self.nf4 is None else self.nf4
        out = F.linear(input, weight) if isinstance(weight, Tensor) else nf4_linear(input, weight)
        if not self.enabled:
            return out if self.bias is None else out + self.bias
        a_RI, b_OR = self.lora_A.to(input.dtype), self.lora_B.to(input.dtype)
        low = F.linear(F.dropout(input, self.dropout, self.training), a_RI) * self.scale
        out = out + F.linear(low, b_OR)
        if self.magnitude is not None:
            out = out * gain(self.magnitude, weight_of(weight), a_RI, b_OR, self.scale).to(out.dtype)
        return out if self.bias is None else out + self.bias


class LoraHead(OlmoeHead):
    """The frozen head with an adapter."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    enabled: bool = True
    """As in LoraLinear."""

    def __init__(self, config: OlmoeConfig, base: OlmoeHead, spec: AdapterSpec) -> None:
        with torch.device("meta"):
            super().__init__(config)
        self.weight, self.log_probs = base.weight, base.log_probs
        self.scale, self.dropout = spec.scale, spec.dropout
        add_parameters(self, spec, "", tuple(base.weight.shape), base.weight.device)

    def forward(self, x: Tensor, labels_T: Tensor | None = None, targets_P: Tensor | None = None) -> Tensor:
        """As OlmoeHead.forward."""
        if not self.enabled:
            return super().forward(x, labels_T, targets_P)
        a_RD, b_VR = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        low = F.linear(F.dropout(x, self.dropout, self.training), a_RD) * self.scale
        gain_V = None
        if self.magnitude is not None:
            gain_V = gain(self.magnitude, self.weight, a_RD, b_VR, self.scale).to(x.dtype)
        adapter = HeadAdapter(low, b_VR, gain_V)
        if targets_P is not None:
            return target_log_probs_of(x, self.weight, targets_P, self.log_probs, adapter)
        if labels_T is not None:
            return cross_entropy_sum(x, self.weight, labels_T, self.log_probs, adapter)
        logits = F.linear(x, self.weight) + F.linear(low, b_VR)
        return logits if gain_V is None else logits * gain_V


class LoraEmbedding(nn.Embedding):
    """The frozen embedding with an adapter, whose input is a one-hot vector. Dropout does not apply to it."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None
    enabled: bool = True
    """As in LoraLinear."""

    def __init__(self, base: nn.Embedding, spec: AdapterSpec) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, device="meta")
        self.weight = base.weight
        self.scale = spec.scale
        # As a linear map the embedding is weight.T [D, V].
        add_parameters(self, spec, "", (base.embedding_dim, base.num_embeddings), base.weight.device)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name in nn.Embedding
        out = super().forward(input)
        if not self.enabled:
            return out
        a_RV, b_DR = self.lora_A.to(out.dtype), self.lora_B.to(out.dtype)
        out = out + F.linear(F.embedding(input, a_RV.t(), self.padding_idx) * self.scale, b_DR)
        if self.magnitude is not None:
            out = out * gain(self.magnitude, self.weight.t(), a_RV, b_DR, self.scale).to(out.dtype)
        return out


def add_parameters(
    module: nn.Module,
    spec: AdapterSpec,
    prefix: str,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Register the parameters of an adapter, fp32 and unset, in the module that it adapts.

    Args:
        module: The module.
        spec: Rank of the adapter, and whether it has magnitudes. Without them `magnitude` is None.
        prefix: Before each name: "gate_up_" or "down_" for experts.
        shape: (O, I) of the weight, or (E, O, I).
        device: Where the parameters go.
    """
    *experts, out_width, in_width = shape

    def empty(*sizes: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*experts, *sizes, dtype=torch.float32, device=device))

    module.register_parameter(f"{prefix}lora_A", empty(spec.rank, in_width))
    module.register_parameter(f"{prefix}lora_B", empty(out_width, spec.rank))
    module.register_parameter(f"{prefix}magnitude", empty(out_width) if spec.dora else None)


def weight_of(weight: Tensor | Nf4Weight) -> Tensor:
    """The weight itself; an NF4 weight is dequantized."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)


def gain(magnitude: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """m / ||W + s B A|| for each row, [O] or [E, O]. Only m gets a gradient (DoRA, section 4.3)."""
    return magnitude / row_norms(weight, a, b, scale)


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Norm of each row of W + s B A, in fp32 (fp64 for fp64), without that matrix in memory:

    ||W_o + s B_o A||^2 = ||W_o||^2 + 2 s B_o . (A W_o) + s^2 B_o (A A^T) B_o^T

    Args:
        weight: [O, I], or [E, O, I] for stacked experts.
        a: [R, I] or [E, R, I].
        b: [O, R] or [E, O, R].
        scale: s.

    Returns:
        [O] or [E, O].
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    products_OR = (weight @ a.to(weight.dtype).transpose(-1, -2)).to(exact)
    a, b = a.to(exact), b.to(exact)
    square = torch.linalg.vector_norm(weight, dim=-1, dtype=exact).square()
    square = square + scale * (b * (2 * products_OR + scale * (b @ (a @ a.transpose(-1, -2))))).sum(-1)
    # A row of zeros has magnitude 0, and its gain is then 0 and not NaN.
    return square.clamp(min=0).sqrt().clamp(min=torch.finfo(exact).tiny)
