"""Adds an adapter to the weights that it adapts.

Shapes: O and I the widths of a weight, R rank of the adapter, E experts, D hidden, V vocabulary.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from olmoe_train.model.adapters.spec import AdapterSpec, adapter_names


def merged(
    name: str, weight: Tensor, names: Collection[str], read: Callable[[str], Tensor], spec: AdapterSpec
) -> Tensor:
    """A weight with its adapter: W + s B A, and for DoRA m / ||W + s B A|| times that.

    Args:
        name: Name of the weight.
        weight: [O, I]; of stacked experts [E, O, I]; of the embedding [V, D]. Any float dtype.
        names: Names of the adapter's tensors.
        read: Returns a tensor of the adapter by its name.
        spec: The adapter.

    Returns:
        fp32, or `weight` itself if it has no adapter. Beside the result, no more than one expert's update is
        in memory.
    """
    name_a, name_b, name_m = adapter_names(name)
    if name_a not in names:
        return weight
    a, b = read(name_a).float(), read(name_b).float()
    magnitude = read(name_m).float() if spec.dora else None
    out = weight.to(torch.float32, copy=True)
    if "embed_tokens" in name:  # as a linear map the embedding is weight.T
        _add_update(out.t(), a, b, magnitude, spec.scale)
    elif weight.ndim == 2:
        _add_update(out, a, b, magnitude, spec.scale)
    else:
        for expert in range(len(out)):
            of_expert = None if magnitude is None else magnitude[expert]
            _add_update(out[expert], a[expert], b[expert], of_expert, spec.scale)
    return out


def _add_update(out_OI: Tensor, a_RI: Tensor, b_OR: Tensor, magnitude_O: Tensor | None, scale: float) -> None:
    out_OI += scale * (b_OR @ a_RI)
    if magnitude_O is not None:
        norm_O = torch.linalg.vector_norm(out_OI, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        out_OI *= (magnitude_O / norm_O)[:, None]
