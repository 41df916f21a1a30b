"""Activation functions of the gated expert MLP, by the names that `hidden_act` has in Hugging Face configs.

`prelu` and `xielu` are left out: they have trainable parameters, which no OLMoE checkpoint has. Every
function here is elementwise: the result has the shape and the dtype of x.
"""

import math
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor


def _clipped_gelu(x: Tensor) -> Tensor:
    """GELU clipped to [-10, 10], for quantized networks (arXiv 2004.09602)."""
    return F.gelu(x).clamp(-10.0, 10.0)


def _quick_gelu(x: Tensor) -> Tensor:
    """Sigmoid approximation of GELU (arXiv 1606.08415, section 2)."""
    return x * (1.702 * x).sigmoid()


def _laplace(x: Tensor) -> Tensor:
    """Mega's approximation of squared ReLU (arXiv 2209.10655): the CDF of a normal distribution with mean
    sqrt(1/2) and standard deviation sqrt(1 / (4 pi))."""
    return 0.5 * (1.0 + ((x - 0.707107) / (0.282095 * math.sqrt(2.0))).erf())


_tanh_gelu = partial(F.gelu, approximate="tanh")

# OLMoE-1B-7B has silu. The other names are Transformers' (its activations.py), including its synonyms.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": lambda x: x.sigmoid(),
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": lambda x: x.tanh(),
}
