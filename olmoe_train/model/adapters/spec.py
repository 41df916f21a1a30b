"""What an adapter is: its size, its scale and the weights that it adapts.

LoRA (arXiv 2106.09685) adds s B A to a frozen weight W [O, I]: y = x W^T + s (x A^T) B^T, with A [R, I],
B [O, R] and s = alpha / R. rsLoRA (arXiv 2312.03732) takes s = alpha / sqrt(R). DoRA (arXiv 2402.09353) also
trains the norm m [O] of every row: y = m / ||W + s B A|| (x W^T + s (x A^T) B^T). The norm of each row counts
as a constant in backward (section 4.3).

Shapes: R rank of the adapter, I and O the widths of a weight [O, I], E experts, D hidden, F expert width,
V vocabulary.

Names of an adapter's tensors, each in the module that it adapts:

    q_proj, k_proj, v_proj, o_proj, lm_head    lora_A [R, I], lora_B [O, R], magnitude [O]
    embed_tokens                               lora_A [R, V], lora_B [D, R], magnitude [D]
    experts                                    gate_up_lora_A [E, R, D], gate_up_lora_B [E, 2F, R],
                                               gate_up_magnitude [E, 2F], down_lora_A [E, R, F],
                                               down_lora_B [E, D, R], down_magnitude [E, D]

Only DoRA has magnitudes.
"""

import math
from dataclasses import dataclass

ATTENTION = "attention"
EXPERTS = "experts"
LM_HEAD = "lm_head"
EMBEDDINGS = "embeddings"
TARGETS = (ATTENTION, EXPERTS, LM_HEAD, EMBEDDINGS)
"""The names of the targets, as `adapter.targets` takes them."""


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter, as the model and its files see it."""

    rank: int
    """R."""
    alpha: float
    """Numerator of the scale."""
    targets: tuple[str, ...]
    """Names out of TARGETS, in the order of TARGETS."""
    dropout: float = 0.0
    """Probability with which an element of the adapter's input is 0 in training."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(R), and not alpha / R."""
    dora: bool = False
    """Whether the adapter has magnitudes."""
    trains_router: bool = False
    """Whether the router's own weights are trained, next to the adapter."""

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class BaseIdentity:
    """Which weights an adapter was trained on."""

    path: str
    """Where they were, absolute."""
    xxh3_128: str
    """Hash of their names, dtypes and bytes, in hexadecimal; the same for every file layout."""


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter of this name is part of an adapter."""
    return name.endswith(("lora_A", "lora_B", "magnitude"))


def adapter_names(weight: str) -> tuple[str, str, str]:
    """Names of lora_A, lora_B and magnitude of a weight, whether or not it has an adapter.

    Args:
        weight: Name of the weight, such as `model.layers.0.mlp.experts.down_proj`.
    """
    module, _, kind = weight.rpartition(".")
    prefix = "" if kind == "weight" else kind.removesuffix("proj")
    return f"{module}.{prefix}lora_A", f"{module}.{prefix}lora_B", f"{module}.{prefix}magnitude"
