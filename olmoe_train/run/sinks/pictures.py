"""Heat maps as RGB arrays, for sinks that show images.

Shapes: R rows, C columns, H and W pixels, L layers, E experts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
WIDTH, SMALLEST_CELL = 512, 4
"""Pixels: width of the map of the experts' loads, twice that of a square of the routing flow; and the least
side of a cell, for which the picture grows."""
OCTAVES = 2.0
"""The colors range from 1/4 to 4 times the balanced value."""
# Blue, white and red of ColorBrewer's RdBu, which people with color-blindness can tell apart.
_COLORS = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]])
_GAP, _WHITE = 8, 255


def load_map(loads: Sequence[Sequence[float]]) -> Image:
    """Layers x experts: white is the balanced load 1 / E, red is more, blue is less.

    Args:
        loads: [L][E], the share of each expert in the tokens of its layer.

    Returns:
        uint8 [H, W, 3]; layer 0 is at the top.
    """
    load_LE = np.array(loads)
    return _colored(load_LE * load_LE.shape[1], WIDTH)


def flow_map(flow_LEE: NDArray[np.float32]) -> Image:
    """One square per pair of consecutive layers, from left to right and top to bottom.

    A row is an expert of a layer, and a column is an expert of the next layer. White is independent routing:
    the share of the next layer's expert in all tokens. Red is more, blue is less.

    Args:
        flow_LEE: Tokens by first choice in a layer and in the next one, [L - 1, E, E].

    Returns:
        uint8 [H, W, 3].
    """
    squares = []
    for flow_EE in flow_LEE.astype(np.float64):
        independent_EE = flow_EE.sum(1, keepdims=True) * flow_EE.sum(0, keepdims=True) / max(1, flow_EE.sum())
        ratio_EE = np.divide(flow_EE, independent_EE, out=np.ones_like(flow_EE), where=independent_EE > 0)
        square = _colored(ratio_EE, WIDTH // 2)
        squares.append(np.pad(square, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=_WHITE))
    across = int(np.ceil(np.sqrt(len(squares))))
    squares += [np.full_like(squares[0], _WHITE)] * (-len(squares) % across)
    rows = [np.concatenate(squares[at : at + across], 1) for at in range(0, len(squares), across)]
    return np.concatenate(rows)


def _colored(ratio_RC: NDArray[np.float64], width: int) -> Image:
    """Color ratios to the balanced value, on a logarithmic scale. width: of the picture, in pixels."""
    cell = max(SMALLEST_CELL, width // ratio_RC.shape[1])
    with np.errstate(divide="ignore"):
        place_RC = np.log2(ratio_RC).clip(-OCTAVES, OCTAVES)
    points = np.linspace(-OCTAVES, OCTAVES, len(_COLORS))
    color_RC3 = np.stack([np.interp(place_RC, points, channel) for channel in _COLORS.T], -1)
    return color_RC3.round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
