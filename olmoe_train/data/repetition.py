"""The released run's filter of sequences that say the same thing over and over, which make the loss spike.

Its bounds are those of OLMo's instance filter (olmo/data/util.py, `find_periodic_sequences`): periods of 1 to
13 tokens, 32 repetitions.
"""

import numpy as np

MAX_PERIOD = 13
MIN_REPETITIONS = 32


def is_repetitive(tokens: np.ndarray) -> bool:
    """Whether some 1 to 13 tokens come at least 32 times in a row. tokens: [S], any integers.

    `r` repetitions of a period p are a run of (r - 1) * p tokens, each equal to the one p places before it.
    """
    for period in range(1, MAX_PERIOD + 1):
        run = (MIN_REPETITIONS - 1) * period
        if len(tokens) < run + period:
            return False  # and longer periods do not fit either
        # Where the comparison fails; a run lies between two failures, or beside an end.
        breaks = np.flatnonzero(tokens[period:] != tokens[:-period])
        edges = np.concatenate([[-1], breaks, [len(tokens) - period]])
        if np.diff(edges).max() > run:
            return True
    return False
