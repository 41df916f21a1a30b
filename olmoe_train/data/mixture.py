"""Mixtures: several prepared directories (sources) in given shares, as one endless stream of samples.

The source of sample i, and how many samples that source had before it, are a function of i and the shares,
in constant memory. The sources are interleaved so evenly that after any number of samples each source has
its share to within a few samples. So every batch has the requested proportions. The order within a source
is a keyed permutation per epoch (sample_order.py): a source with fewer samples than its share needs is
repeated, of one with more only a part is seen.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from olmoe_train.config.choices import DataFormat
from olmoe_train.config.data import DataConfig
from olmoe_train.data.manifest import Manifest, read_manifest
from olmoe_train.data.tokens import verify_hashes
from olmoe_train.utils.errors import UserError

SCHEDULE = "turns-v1"
"""Name of the algorithm, part of the data fingerprint. Change it whenever a golden vector changes."""

_RESOLUTION = 1 << 32  # shares become integers, so that the schedule is the same on every machine
VALIDATION = "validation"  # name that metrics use for all sources together


class SourceSchedule:
    """Which source each sample of the stream comes from. Costs O(sources x log sources) per sample."""

    def __init__(self, shares: Sequence[float]):
        """Create the schedule of `shares`, one positive number per source, in any unit."""
        self._parts = [max(1, round(share / sum(shares) * _RESOLUTION)) for share in shares]
        self._whole = sum(self._parts)

    @property
    def shares(self) -> list[float]:
        """Share of each source in the samples. The shares sum to 1."""
        return [part / self._whole for part in self._parts]

    def locate(self, index: int) -> tuple[int, int]:
        """Return (source of sample `index`, number of earlier samples of that source)."""
        before, after = self.samples_per_source(index), self.samples_per_source(index + 1)
        source = next(source for source, had in enumerate(before) if after[source] > had)
        return source, before[source]

    def samples_per_source(self, count: int) -> list[int]:
        """Return how many of the first `count` samples come from each source.

        At time t, source i should have had round(share_i * t) samples. The rounded counts grow by at most one
        per unit of time and add up to t within half a sample per source. Find the first t whose counts add up
        to at least `count`, then take back the surplus from the last sources.
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
class MixtureComponent:
    """One source of the training data."""

    name: str
    directory: Path
    weight: float
    """Share relative to the other sources' weights: `weight` or `tokens` of data.mixture."""
    budget: int | None
    """Training tokens: `tokens` of data.mixture. None: the mixture has weights."""


def mixture_components(data: DataConfig) -> list[MixtureComponent]:
    """List the sources of data.mixture. Without a mixture, data.dir is the only one, named "validation"."""
    root = Path(data.dir).expanduser()
    if not data.mixture:
        return [MixtureComponent(VALIDATION, root, 1.0, None)]
    found = []
    for source in data.mixture:
        directory = root / Path(source.dir).expanduser()
        weight = source.weight if source.weight is not None else source.tokens
        name = source.name or directory.name
        found.append(MixtureComponent(name, directory, float(weight or 0), source.tokens))
    return found


def only_directory(data: DataConfig, directory: Path) -> DataConfig:
    """The same section `data` for one prepared directory in place of data.dir and data.mixture."""
    return replace(data, dir=str(directory), mixture=[])


def mixture_errors(data: DataConfig) -> list[str]:
    """Return what is wrong with data.mixture, one message per problem. The directories are not read."""
    errors = []
    for index, part in enumerate(data.mixture):
        key = f"data.mixture[{index}]"
        if (part.weight is None) == (part.tokens is None):
            errors.append(
                f"{key}: give either weight or tokens; it has weight={part.weight}, tokens={part.tokens}"
            )
        for name in ("weight", "tokens"):
            value = getattr(part, name)
            if value is not None and value <= 0:
                errors.append(f"{key}.{name}={value}: must be positive; leave the source out instead")
    by_weight = [part.weight is not None for part in data.mixture]
    if not errors and any(by_weight) and not all(by_weight):
        errors.append("data.mixture: some sources have weights and others tokens; use the same for all")
    names = [source.name for source in mixture_components(data)] if data.mixture else []
    for name in sorted({name for name in names if names.count(name) > 1}):
        errors.append(
            f"data.mixture: {names.count(name)} sources are named {name}; give each a different name"
        )
    if VALIDATION in names:
        errors.append(
            f"data.mixture: a source may not be named {VALIDATION}, the name of all of them together"
        )
    return errors


def read_manifests(data: DataConfig) -> dict[str, Manifest]:
    """Read the manifest of each source, by the source's name.

    Raises:
        UserError: A manifest is missing or damaged, or a source has another tokenizer than the first one.
    """
    manifests = {source.name: read_manifest(source.directory) for source in mixture_components(data)}
    (first_name, first), *others = manifests.items()
    for name, manifest in others:
        for key in ("tokenizer_sha256", "eos_token_id"):
            mine, theirs = getattr(manifest, key), getattr(first, key)
            if mine != theirs:
                raise UserError(
                    f"data.mixture: {name} and {first_name} were prepared with different tokenizers "
                    f"({key}: {mine} and {theirs}).\n  Prepare both with the same tokenizer.path."
                )
    return manifests


def verify(data: DataConfig) -> None:
    """Check each source as data.format and data.verify_hashes ask.

    Raises:
        UserError: The data has another format than data.format says, or a file changed.
    """
    for source in mixture_components(data):
        if data.format is DataFormat.olmo and not read_manifest(source.directory).tokens_in_place:
            raise UserError(
                f"data.format=olmo: {source.directory} holds its own tokens, not an index of token files.\n"
                "  Leave data.format out, or give a data.dir that `olmoe prepare data=olmo` wrote."
            )
        if data.verify_hashes:
            verify_hashes(source.directory)


def source_seed(seed: int, position: int) -> int:
    """Return the seed of a source's order. It depends on the source's position, so that sources of the same
    size are ordered differently.
    """
    return int.from_bytes(
        hashlib.blake2b(f"{seed}:source:{position}".encode(), digest_size=8).digest(), "little"
    )
