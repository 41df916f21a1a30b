"""The released run's filter of repetitive sequences, which cause loss spikes.

Its bounds are those of OLMo's instance filter (olmo/data/util.py, `find_periodic_sequences`): periods of 1 to
13 tokens, 32 repetitions.
"""

import numpy as np

MAX_PERIOD = 13
MIN_REPETITIONS = 32


def is_repetitive(tokens: np.ndarray) -> bool:
    """Return whether a group of 1 to 13 tokens repeats at least 32 times in a row.

    With r repetitions of a group of p tokens, (r - 1) * p tokens in a row equal the token p positions
    earlier.

    Args:
        tokens: [S], any integer dtype.
    """
    for period in range(1, MAX_PERIOD + 1):
        run = (MIN_REPETITIONS - 1) * period
        if len(tokens) < run + period:
            return False  # longer periods do not fit either
        # Positions where the comparison fails. Runs of equal tokens lie between them, or at either end.
        breaks = np.flatnonzero(tokens[period:] != tokens[:-period])
        edges = np.concatenate([[-1], breaks, [len(tokens) - period]])
        if np.diff(edges).max() > run:
            return True
    return False
