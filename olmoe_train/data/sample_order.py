"""The order of training samples: a keyed permutation, computed index by index in constant memory.

A balanced Feistel network permutes [0, 4^n), a domain with at least as many elements as there are samples.
An index that is mapped outside the samples is mapped again until it lands inside ("cycle walking", Black
and Rogaway 2002, "Ciphers with arbitrary finite domains"). Every epoch has its own key. All arithmetic is
on Python integers, so the order is the same on every machine. The tests freeze some of its values, because
a change would silently reorder resumed runs.
"""

import hashlib
from functools import lru_cache

ORDER = "feistel8-splitmix64-v1"
"""Name of the algorithm, part of the data fingerprint. Change it whenever a golden vector changes."""

_ROUNDS = 8
# With narrower halves the network has too few states to reach every order of a tiny data set.
_MIN_HALF_BITS = 4
_MAX_HALF_BITS = 64  # width of the round function, in bits
_MASK_64 = 2**64 - 1


def sample_for(global_index: int, num_samples: int, seed: int) -> int:
    """Return the sample, in [0, num_samples), at position `global_index` of an endless stream of epochs.

    Args:
        global_index: Position in the stream, from 0. Each epoch is a new permutation of all samples.
        num_samples: Samples per epoch.
        seed: Seed of the order.
    """
    epoch, position = divmod(global_index, num_samples)
    return permuted_index(position, num_samples, seed, epoch)


def permuted_index(index: int, size: int, seed: int, epoch: int = 0) -> int:
    """Return the image of `index` under the permutation of range(size) selected by (seed, epoch).

    `size` may be up to 2**128. For size > 64 the network's domain has fewer than 4 * size elements, so the
    expected cost is below 4 passes of 8 rounds.
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
        left, right = right, left ^ (splitmix64_finalizer(right ^ key) & mask)
    return left << half_bits | right


def splitmix64_finalizer(x: int) -> int:
    """Output of splitmix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """Derive eight 64-bit keys by hashing, so that neighboring seeds and epochs have unrelated keys."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))
