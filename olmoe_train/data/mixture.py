"""Mixtures: several prepared directories (sources) in given shares, as one endless stream of samples.
The shares may change from stage to stage (stages.py).

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
from olmoe_train.config.data import DataConfig, DataStage, MixtureSource
from olmoe_train.data.manifest import Manifest, read_manifest
from olmoe_train.data.remote import last_name, local_directory, resolve
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
    """Share relative to the weights of the other sources of the mixture, or of the stage: `weight` or
    `tokens`."""
    budget: int | None
    """Training tokens: `tokens` of data.mixture. None: the mixture has weights."""


def has_sources(data: DataConfig) -> bool:
    """Whether the data has named sources, those of data.mixture or data.stages. Otherwise it is data.dir."""
    return bool(data.mixture or data.stages)


def sources_key(data: DataConfig) -> str:
    """The key that names the sources, for messages."""
    return "data.stages" if data.stages else "data.mixture"


def mixture_components(data: DataConfig) -> list[MixtureComponent]:
    """List the sources of the data, each once. Without named sources, data.dir is the only one, named
    "validation". A source of several stages has the weight of its first stage."""
    if data.stages:
        found: dict[str, MixtureComponent] = {}
        for one in (one for stage in data.stages for one in stage_components(data, stage)):
            found.setdefault(one.name, one)
        return list(found.values())
    if data.mixture:
        return mixture_of(data, data.mixture)
    return [MixtureComponent(VALIDATION, local_directory(data, data.dir), 1.0, None)]


def stage_components(data: DataConfig, stage: DataStage) -> list[MixtureComponent]:
    """List the sources of one stage."""
    return mixture_of(data, [MixtureSource(stage.dir, weight=1.0)] if stage.dir else stage.mixture)


def mixture_of(data: DataConfig, mixture: list[MixtureSource]) -> list[MixtureComponent]:
    """List the sources of one mixture."""
    found = []
    for source in mixture:
        path = resolve(data.dir, source.dir)
        weight = source.weight if source.weight is not None else source.tokens
        name = source.name or last_name(path)
        found.append(MixtureComponent(name, local_directory(data, path), float(weight or 0), source.tokens))
    return found


def only_directory(data: DataConfig, directory: Path) -> DataConfig:
    """The same section `data` for one prepared directory in place of all sources."""
    return replace(data, dir=str(directory), mixture=[], stages=[])


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
                    f"{sources_key(data)}: {name} and {first_name} were prepared with different tokenizers "
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
