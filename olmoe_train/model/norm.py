"""RMSNorm with the order of casts that Transformers has for OLMoE; and the norm that the paper compared it
with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe_train.model.configuration import OlmoeConfig


class OlmoeRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over the last dimension in fp32, cast to x's dtype, then times the weight.

    Args:
        size: Width of the last dimension.
        eps: Added to the mean square (`OlmoeConfig.rms_norm_eps`).
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] of any floating-point dtype; the result has the same shape."""
        # F.rms_norm computes in fp32 for every dtype of x, in one kernel on CUDA.
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)


class NonparametricLayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) over the last dimension, in fp32 and cast to x's dtype: LayerNorm
    without weight and bias, as in the first OLMo (arXiv 2402.00838, section 2.1).

    Args:
        eps: Added to the variance (`OlmoeConfig.rms_norm_eps`).
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] of any floating-point dtype; the result has the same shape."""
        return F.layer_norm(x, (x.shape[-1],), eps=self.eps)


def build_norm(config: OlmoeConfig, size: int) -> nn.Module:
    """The norm that `config.norm` names, over a last dimension of `size`."""
    if config.norm == "nonparametric":
        return NonparametricLayerNorm(config.rms_norm_eps)
    return OlmoeRMSNorm(size, config.rms_norm_eps)
