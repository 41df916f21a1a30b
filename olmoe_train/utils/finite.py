"""Values that are not finite: NaN and the infinities."""

import torch
from torch import Tensor


def first_not_finite(tensor: Tensor) -> str | None:
    """The first value that is not finite, in the order of memory.

    Args:
        tensor: Floating point, of any shape.

    Returns:
        Its index and value as text, such as "[3, 0] is nan". None: all values are finite.
    """
    if not tensor.numel() or torch.stack(torch.aminmax(tensor)).isfinite().all():  # a NaN is both extremes
        return None
    flat_index = (~tensor.isfinite()).flatten().byte().argmax()  # the first of equal values
    index = [int(i) for i in torch.unravel_index(flat_index, tensor.shape)]
    return f"{index} is {tensor[tuple(index)].item()}"
