"""The heat maps: which cell is where, and which color it has."""

import numpy as np

from olmoe_train.run.sinks.pictures import flow_map, load_map

BLUE, WHITE, RED = [33, 102, 172], [247, 247, 247], [178, 24, 43]


def test_the_map_of_loads() -> None:
    picture = load_map([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    assert picture.shape == (256, 512, 3)
    cells = picture[64::128, 64::128].tolist()
    assert cells == [[WHITE] * 4, [RED, BLUE, BLUE, BLUE]]


def test_the_map_of_the_routing_flow() -> None:
    independent = np.outer([2, 4], [3, 1])
    tied = np.array([[8, 0], [0, 8]])
    squares = np.array([independent, tied], dtype=np.float32)
    picture = flow_map(squares)
    assert picture.shape == (264, 528, 3)
    cells = picture[64:256:128, [64, 192, 328, 456]].tolist()
    between = cells[0][2]  # twice as many as independent routing
    assert cells == [[WHITE, WHITE, between, BLUE], [WHITE, WHITE, BLUE, between]]
    assert between == [212, 136, 145]
