"""Requests that share their beginnings, packed so that the model computes each beginning once.

The choices of a question share the question, and few-shot questions share the examples. Sorted requests form
a tree of tokens. A pack is a part of that tree in one sequence: a token attends to the tokens on its path
from the root and to nothing else, and its position is its depth. So each request gets what it gets alone, in
every layout, without a key/value cache.

Shapes: S tokens of a pack, P target tokens of a pack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from olmoe_train.evaluation.tasks.requests import Request, Tokens

Indices = NDArray[np.int64]


@dataclass
class PrefixPack:
    """Requests in one sequence."""

    tokens: list[Tokens] = field(default_factory=list)
    """The new tokens of each segment; a request adds one segment, which may be empty."""
    positions: list[Indices] = field(default_factory=list)
    """Position of each of these tokens: its depth in the tree."""
    paths: list[Indices] = field(default_factory=list)
    """Before each segment, the places in the sequence that the segment continues."""
    places: list[Indices] = field(default_factory=list)
    """Of each request, where in the sequence its targets are predicted."""
    targets: list[Tokens] = field(default_factory=list)
    """Of each request, the tokens of its continuation."""
    requests: list[int] = field(default_factory=list)
    """Number of each request."""
    length: int = 0
    """S."""

    def add(self, number: int, request: Request, path: Indices) -> Indices:
        """Add a request. path: places of the tokens that it shares with the pack. Returns its whole path."""
        read = request.tokens[:-1]
        fresh = read[len(path) :]
        whole = np.concatenate([path, np.arange(self.length, self.length + len(fresh))])
        self.tokens.append(fresh)
        self.positions.append(np.arange(len(path), len(read)))
        self.paths.append(path)
        self.places.append(whole[-request.targets :])
        self.targets.append(request.tokens[-request.targets :])
        self.requests.append(number)
        self.length += len(fresh)
        return whole

    def mask(self, length: int) -> NDArray[np.bool_]:
        """Bool [length, length]: whether a token attends to another one. Padding attends to itself."""
        mask_SS = np.eye(length, dtype=bool)
        start = 0
        for fresh, path in zip(self.tokens, self.paths, strict=True):
            end = start + len(fresh)
            mask_SS[start:end, path] = True
            mask_SS[start:end, start:end] = np.tri(len(fresh), dtype=bool)
            start = end
        return mask_SS


def pack_requests(requests: Sequence[Request], tokens_per_pass: int) -> list[PrefixPack]:
    """Pack requests, in an order that depends on their tokens only.

    Args:
        requests: The requests. Equal ones cost one.
        tokens_per_pass: Greatest number of tokens of a pack. A longer request has a pack of its own, which
            other requests may share.
    """
    packs: list[PrefixPack] = []
    path = np.empty(0, np.int64)
    before: Tokens = np.empty(0, np.int32)
    for number in _sorted(requests):
        request = requests[number]
        read = request.tokens[:-1]
        shared = min(_common_length(before, read), len(read))
        if not packs or packs[-1].length + len(read) - shared > tokens_per_pass:
            packs.append(PrefixPack())
            shared = 0
        path = packs[-1].add(number, request, path[:shared])
        before = read
    return packs


def _sorted(requests: Sequence[Request]) -> Iterator[int]:
    """Numbers of the requests, sorted by the tokens that the model reads; equal ones keep their order."""
    # As big-endian bytes, tokens compare like numbers.
    keys = [request.tokens[:-1].astype(">u4").tobytes() for request in requests]
    return iter(sorted(range(len(requests)), key=keys.__getitem__))


def _common_length(left: Tokens, right: Tokens) -> int:
    """Number of tokens that two texts share from their start."""
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length
