"""RMSNorm with the order of casts that Transformers has for OLMoE."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
