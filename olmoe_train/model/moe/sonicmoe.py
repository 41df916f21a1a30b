"""Experts by the kernels of the sonic-moe package (arXiv 2512.14080): model.experts_backend=sonicmoe.

Written after the sources of sonic-moe 0.1.2.post1, and not run by us yet: benchmarks/gpu_step.py holds it
against Transformers where it can run. That release asks pip for torch <= 2.9.1, this project for >= 2.11; so
it is no extra of this package: `pip install "quack-kernels>=0.3.11"`, `pip install --no-deps sonic-moe`.

Shapes: N inputs, J experts of each, D hidden, F expert width, H 2 F, E experts.
"""

import importlib.util
import sys

import torch
from torch import Tensor

_CAPABILITIES = {9: "Hopper", 10: "Blackwell"}


def sonic_experts(
    x_ND: Tensor, weights_NJ: Tensor, indices_NJ: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """out_ND: for each input the sum over its experts of weight x expert(input), SwiGLU; differentiable in
    inputs, weights and both matrices. indices_NJ: int64, the experts. Matrices contiguous, bf16."""
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    inputs, choices = indices_NJ.shape
    tokens = torch.arange(inputs, dtype=torch.int32, device=x_ND.device)
    # It wants matrices as (H, D, E) and (D, F, E) views with the experts outermost in memory, which they are.
    out_ND, _ = moe_general_routing_inputs(
        x_ND,
        weights_NJ.float().reshape(-1),
        tokens.repeat_interleave(choices),
        indices_NJ.to(torch.int32).reshape(-1),
        gate_up_EHD.permute(1, 2, 0),
        None,
        down_EDF.permute(1, 2, 0),
        None,
        len(down_EDF),
        torch.cuda.current_stream(x_ND.device).cuda_stream if x_ND.is_cuda else 0,
        ActivationType.SWIGLU,
        concat_layout=True,  # gate above up, not a row of each in turn
    )
    return out_ND


def why_not_here(cuda: bool) -> str | None:
    """What this machine lacks, if anything. cuda: whether the run is on a GPU."""
    version = tuple(sys.version_info)  # mypy compares the attribute itself with the oldest Python supported
    if version < (3, 12):
        return f"sonic-moe needs Python >= 3.12, this is {version[0]}.{version[1]}"
    if not cuda:
        return "its kernels run on NVIDIA GPUs alone"
    if importlib.util.find_spec("sonicmoe") is None:
        return 'no sonic-moe; `pip install "quack-kernels>=0.3.11"`, `pip install --no-deps sonic-moe`'
    if (major := torch.cuda.get_device_capability()[0]) not in _CAPABILITIES:
        return f"its kernels are for {' and '.join(_CAPABILITIES.values())}; this GPU's capability is {major}"
    return None
