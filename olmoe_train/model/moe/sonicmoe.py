"""The kernels of the sonic-moe package (arXiv 2512.14080) as experts: model.experts_backend=sonicmoe.

This module follows the sources of sonic-moe 0.1.2.post1 and has not been run yet. On a GPU that supports the
kernels, benchmarks/gpu_step.py compares the result with Transformers. sonic-moe is not an extra of this
package, because that release requires torch <= 2.9.1 and this project requires torch >= 2.11. Install it by
`pip install "quack-kernels>=0.3.11"` and `pip install --no-deps sonic-moe`.

Shapes: N inputs, J experts per input, D hidden, F expert width, H gate and up together (2 F), E experts.
"""

import importlib.util
import sys

import torch
from torch import Tensor

# Major CUDA compute capabilities for which sonic-moe has kernels.
_CAPABILITIES = {9: "Hopper", 10: "Blackwell"}


def sonic_experts(
    x_ND: Tensor, weights_NJ: Tensor, indices_NJ: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """For each input, sum weight x expert(input) over the experts of the input. The activation is SwiGLU.

    The result is differentiable with respect to inputs, weights and both matrices.

    Args:
        x_ND: Inputs.
        weights_NJ: Routing weights, any float dtype.
        indices_NJ: int64, the experts of each input.
        gate_up_EHD: Gate and up matrices, bf16, contiguous.
        down_EDF: Down matrices, bf16, contiguous.

    Returns:
        out_ND.
    """
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    inputs, choices = indices_NJ.shape
    tokens = torch.arange(inputs, dtype=torch.int32, device=x_ND.device)
    # sonic-moe expects (H, D, E) and (D, F, E) views of matrices whose expert dimension is outermost in
    # memory. The contiguous stacked weights fulfill this.
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
        concat_layout=True,  # all gate rows, then all up rows; not interleaved
    )
    return out_ND


def why_not_here(cuda: bool) -> str | None:
    """Reason why the sonic-moe kernels cannot run on this machine.

    Args:
        cuda: Whether the run computes on a GPU.

    Returns:
        The first missing requirement, or None if the kernels can run.
    """
    version = tuple(sys.version_info)  # mypy evaluates sys.version_info for the oldest Python only
    if version < (3, 12):
        return f"sonic-moe needs Python >= 3.12, this is {version[0]}.{version[1]}"
    if not cuda:
        return "its kernels run on NVIDIA GPUs alone"
    if importlib.util.find_spec("sonicmoe") is None:
        return 'no sonic-moe; `pip install "quack-kernels>=0.3.11"`, `pip install --no-deps sonic-moe`'
    if (major := torch.cuda.get_device_capability()[0]) not in _CAPABILITIES:
        return f"its kernels are for {' and '.join(_CAPABILITIES.values())}; this GPU's capability is {major}"
    return None
