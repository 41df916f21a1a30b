"""RMSNorm as Transformers computes it for OLMoE."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OlmoeRMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back to x's dtype, then scaled by the weight (transformers' order of
    casts)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # fp32 inside, whatever x is; on CUDA in one kernel.
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)
