"""Values that are not finite: NaN and the infinities."""

import math
from typing import Any

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


def finite_or_none(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: None in place of each, also within lists and
    dictionaries."""
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
