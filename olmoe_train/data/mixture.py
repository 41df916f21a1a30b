"""Mixtures: several prepared directories in given shares, as one endless stream in constant memory.

Sample i of the stream belongs to a source, and is its how-manieth: both follow from i and the shares alone.
The sources take turns so evenly that after any number of samples each has had its share to within a few
samples, so a step's batch is always the mixture that was asked for. Within a source the order is its own
keyed permutation, epoch after epoch (order.py): a source that is asked for more than it has is repeated, one
that is asked for less is not seen whole.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from olmoe_train.config.choices import DataFormat
from olmoe_train.config.data import DataConfig
from olmoe_train.data.tokens import Manifest, read_manifest, verify_hashes
from olmoe_train.utils.errors import UserError

TURNS = "turns-v1"
"""Name of this algorithm, part of the loader's fingerprint: change it whenever a golden vector changes."""

_RESOLUTION = 1 << 32  # shares are integers, so that turns are the same on every machine
VALIDATION = "validation"  # what metrics call all sources together


class Turns:
    """Which source each sample of the stream belongs to. Cost: O(sources x log sources) a sample."""

    def __init__(self, shares: Sequence[float]):
        """shares: positive, in any unit."""
        self._parts = [max(1, round(share / sum(shares) * _RESOLUTION)) for share in shares]
        self._whole = sum(self._parts)

    @property
    def shares(self) -> list[float]:
        """Shares of the samples, which sum to 1."""
        return [part / self._whole for part in self._parts]

    def place(self, index: int) -> tuple[int, int]:
        """(source, how many samples it has had before) of sample `index`."""
        before, after = self.drawn(index), self.drawn(index + 1)
        source = next(source for source, had in enumerate(before) if after[source] > had)
        return source, before[source]

    def drawn(self, count: int) -> list[int]:
        """How many of the first `count` samples belong to each source.

        By the time t each source is due its share of t, rounded; that is at most one more than by t - 1, and
        all are due t samples, give or take half a sample each. The last time's are given in the order of the
        sources.
        """
        sources = len(self._parts)
        times = range(max(0, count - sources), count + sources + 1)
        time = times[bisect_left(times, count, key=lambda time: sum(self._due(time)))]
        due, before = self._due(time), self._due(time - 1)
        surplus = sum(due) - count
        for source in reversed(range(sources)):
            if surplus and due[source] > before[source]:
                due[source] -= 1
                surplus -= 1
        return due

    def _due(self, time: int) -> list[int]:
        return [(part * time + self._whole // 2) // self._whole for part in self._parts]


@dataclass(frozen=True)
class Source:
    name: str
    directory: Path
    weight: float
    """Relative to the others': data.mixture's weight or tokens."""
    budget: int | None
    """data.mixture's tokens."""


def sources(data: DataConfig) -> list[Source]:
    """What data.mixture lists; without one, data.dir alone, named "validation"."""
    root = Path(data.dir).expanduser()
    if not data.mixture:
        return [Source(VALIDATION, root, 1.0, None)]
    found = []
    for part in data.mixture:
        directory = root / Path(part.dir).expanduser()
        weight = part.weight if part.weight is not None else part.tokens
        found.append(Source(part.name or directory.name, directory, float(weight or 0), part.tokens))
    return found


def mixture_errors(data: DataConfig) -> list[str]:
    """What is wrong with data.mixture itself, the directories aside."""
    errors = []
    for index, part in enumerate(data.mixture):
        key = f"data.mixture[{index}]"
        if (part.weight is None) == (part.tokens is None):
            errors.append(
                f"{key}: give one of weight and tokens; it has weight={part.weight}, tokens={part.tokens}"
            )
        for name in ("weight", "tokens"):
            value = getattr(part, name)
            if value is not None and value <= 0:
                errors.append(f"{key}.{name}={value}: must be positive; leave the source out instead")
    by_weight = [part.weight is not None for part in data.mixture]
    if not errors and any(by_weight) and not all(by_weight):
        errors.append("data.mixture: some sources have a weight and others tokens; give all of them the same")
    names = [source.name for source in sources(data)] if data.mixture else []
    for name in sorted({name for name in names if names.count(name) > 1}):
        errors.append(
            f"data.mixture: {names.count(name)} sources are named {name}; give each a name of its own"
        )
    if VALIDATION in names:
        errors.append(f"data.mixture: a source may not be named {VALIDATION}, which is all of them together")
    return errors


def read_manifests(data: DataConfig) -> dict[str, Manifest]:
    """Each source's manifest, by its name. UserError where one is missing, damaged, or made with another
    tokenizer than the first.
    """
    manifests = {source.name: read_manifest(source.directory) for source in sources(data)}
    (first_name, first), *others = manifests.items()
    for name, manifest in others:
        for key in ("tokenizer_sha256", "eos_token_id"):
            mine, theirs = getattr(manifest, key), getattr(first, key)
            if mine != theirs:
                raise UserError(
                    f"data.mixture: {name} and {first_name} were made with other tokenizers "
                    f"({key}: {mine} and {theirs}).\n  Prepare both with the same tokenizer.path."
                )
    return manifests


def verify(data: DataConfig) -> None:
    """As far as data.format and data.verify_hashes ask. UserError for other data, or files that changed."""
    for source in sources(data):
        if data.format is DataFormat.olmo and not read_manifest(source.directory).tokens_in_place:
            raise UserError(
                f"data.format=olmo: {source.directory} has tokens of its own.\n"
                "  Leave data.format out, or give a data.dir that `olmoe prepare data=olmo` made."
            )
        if data.verify_hashes:
            verify_hashes(source.directory)


def source_seed(seed: int, position: int) -> int:
    """Seed of a source's order, by its place in the mixture: sources of one size are ordered differently."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}:source:{position}".encode(), digest_size=8).digest(), "little"
    )
