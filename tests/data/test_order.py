"""The order of samples: a permutation, a new one each epoch, the same for ever."""

import itertools
from collections import Counter

import pytest

from olmoe_train.data.sample_order import permuted_index, sample_for, splitmix64_finalizer


@pytest.mark.parametrize("size", [1, 2, 3, 7, 255, 256, 257, 1000, 4097])
def test_every_index_comes_once(size: int) -> None:
    assert sorted(permuted_index(i, size, seed=5) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2**40 - 1, 2**40, 2**40 + 1, 2**61 - 1, 10**25])
def test_huge_domains_stay_in_range_and_never_collide(size: int) -> None:
    indices = [*range(2000), *range(size - 2000, size)]
    images = [permuted_index(i, size, seed=1) for i in indices]
    assert all(0 <= image < size for image in images)
    assert len(set(images)) == len(indices)


def test_golden_vectors() -> None:
    """Frozen: a change here reorders the data of every resumed run. Rename ORDER if it has to be."""
    assert [permuted_index(i, 7, seed=0) for i in range(7)] == [1, 4, 0, 5, 6, 2, 3]
    assert [permuted_index(i, 1000, seed=0) for i in range(6)] == [824, 38, 678, 625, 851, 354]
    assert [permuted_index(i, 1000, seed=1) for i in range(6)] == [304, 208, 339, 334, 844, 882]
    assert [permuted_index(i, 2**40, seed=6198) for i in (0, 1, 2, 2**40 - 1)] == [
        1046410221600,
        784674318120,
        1011473028252,
        727222507459,
    ]
    assert [permuted_index(i, 2**40 + 1, seed=6198, epoch=3) for i in (0, 1, 2**40)] == [
        5491017789,
        29457425826,
        646896893743,
    ]
    assert permuted_index(0, 10**25, seed=6198, epoch=3) == 6256359479581366955532444
    epochs = [[4, 0, 3, 1, 2], [2, 0, 1, 4, 3], [3, 4, 1, 2, 0]]
    assert [[sample_for(5 * epoch + i, 5, seed=42) for i in range(5)] for epoch in range(3)] == epochs


def test_round_function_is_splitmix64() -> None:
    # The first output of the published splitmix64 generator from state 0 is the mix of its increment.
    assert splitmix64_finalizer(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_each_epoch_has_every_sample_in_an_order_of_its_own() -> None:
    epochs = [[sample_for(50 * epoch + i, 50, seed=9) for i in range(50)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_orders_are_uniform_over_seeds() -> None:
    """All 6 orders of 3 samples are equally likely: 200 each of 1200 seeds, standard deviation 13."""
    orders = Counter(tuple(permuted_index(i, 3, seed) for i in range(3)) for seed in range(1200))
    assert len(orders) == 6
    assert all(abs(count - 200) < 5 * 13 for count in orders.values())


def test_neighbouring_indices_are_unrelated() -> None:
    """Gaps between images of neighbours are those of uniform pairs: mean 1/3, deviation 0.236."""
    size = 2**40
    images = [permuted_index(i, size, seed=3) / size for i in range(10_001)]
    gaps = [abs(a - b) for a, b in itertools.pairwise(images)]
    assert abs(sum(gaps) / len(gaps) - 1 / 3) < 5 * 0.236 / 100
