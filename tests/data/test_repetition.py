"""The repetition filter: planted cases by hand, and a slow oracle on random ones."""

import numpy as np
import pytest

from olmoe_train.data.repetition import is_repetitive

UNIQUE = list(range(1000, 1600))  # nothing repeats


def repetitive_slowly(tokens: list[int]) -> bool:
    """For each place and period: how often the n-gram there comes in a row."""
    for period in range(1, 14):
        for start in range(len(tokens) - period + 1):
            times = 1
            while tokens[start : start + period] == tokens[start + times * period :][:period]:
                times += 1
            if times >= 32:
                return True
    return False


@pytest.mark.parametrize("before", [0, 1, 7, 200])
@pytest.mark.parametrize("after", [0, 1, 200])
@pytest.mark.parametrize("period", [1, 2, 3, 12, 13])
def test_the_32nd_repetition_counts(period: int, before: int, after: int) -> None:
    def planted(copies: int) -> np.ndarray:
        return np.array(UNIQUE[:before] + list(range(period)) * copies + UNIQUE[300 : 300 + after])

    assert is_repetitive(planted(32))
    assert not is_repetitive(planted(31))


def test_longer_periods_are_let_through() -> None:
    assert not is_repetitive(np.array(list(range(14)) * 40))


def test_an_interruption_starts_the_count_again() -> None:
    assert not is_repetitive(np.array([5] * 31 + [6] + [5] * 31))
    assert is_repetitive(np.array([5] * 31 + [6] + [5] * 32))


@pytest.mark.parametrize("length", [0, 1, 2, 31])
def test_short_sequences_do_not_reach_it(length: int) -> None:
    assert not is_repetitive(np.zeros(length, np.int64))


def test_as_the_slow_oracle_says() -> None:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(300):
        period, copies = int(generator.integers(1, 16)), int(generator.integers(28, 36))
        n_gram = generator.integers(0, 3, period).tolist()  # often of a smaller period itself
        around = generator.integers(0, 3, 40).tolist()
        tokens = (
            around[:20] + (n_gram * copies)[: period * copies - int(generator.integers(0, 2))] + around[20:]
        )
        found.append(is_repetitive(np.array(tokens)))
        assert found[-1] == repetitive_slowly(tokens), tokens
    assert 50 < sum(found) < 250
