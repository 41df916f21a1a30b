"""The order of training samples: a keyed permutation, computed index by index in constant memory.

A balanced Feistel network permutes a power of four that is at least the number of samples; an index that
lands outside is sent through again until it lands inside ("cycle walking", Black and Rogaway 2002, "Ciphers
with arbitrary finite domains"). Every epoch has its own key. The arithmetic is on Python integers alone, so
the order is the same on every machine; tests/unit/test_order.py freezes some values of it, because a change
would silently reorder resumed runs.
"""

import hashlib
from functools import lru_cache

ORDER = "feistel8-splitmix64-v1"
"""Name of this algorithm, part of the loader's fingerprint: change it whenever a golden vector changes."""

_ROUNDS = 8
# Narrower halves have so few values that some orders of a tiny data set would never come up.
_MIN_HALF_BITS = 4
_MAX_HALF_BITS = 64  # width of the round function
_MASK_64 = 2**64 - 1


def sample_for(global_index: int, num_samples: int, seed: int) -> int:
    """The sample, in [0, num_samples), at place `global_index` of an endless run of reshuffled epochs."""
    epoch, position = divmod(global_index, num_samples)
    return permuted_index(position, num_samples, seed, epoch)


def permuted_index(index: int, size: int, seed: int, epoch: int = 0) -> int:
    """Image of `index` under the permutation of range(size) that (seed, epoch) selects; size <= 2**128.

    Expected cost: fewer than 4 passes of 8 rounds for size > 64 (the domain is less than 4 * size).
    """
    assert 0 <= index < size, f"index {index} outside range({size})"
    half_bits = max(_MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    assert half_bits <= _MAX_HALF_BITS, f"size {size} above 2**{2 * _MAX_HALF_BITS}"
    keys = _round_keys(seed, epoch)
    index = _feistel(index, half_bits, keys)
    while index >= size:
        index = _feistel(index, half_bits, keys)
    return index


def _feistel(value: int, half_bits: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half_bits | right


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """Eight 64-bit keys. A hash, so that neighbouring seeds and epochs share nothing."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))
