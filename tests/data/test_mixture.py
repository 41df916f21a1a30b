"""Mixtures: shares kept at every moment, whatever they are; and what cannot be mixed."""

import hashlib
import itertools
import random
from pathlib import Path

import pytest

from olmoe_train.config.data import DataConfig, MixtureSource
from olmoe_train.data.mixture import (
    SourceSchedule,
    mixture_components,
    read_manifests,
    source_seed,
)
from olmoe_train.data.source_errors import mixture_errors
from olmoe_train.utils.errors import UserError
from tests.support.data import write_prepared


def random_shares() -> list[list[float]]:
    generator = random.Random(0)
    several = [[generator.random() ** 4 + 1e-6 for _ in range(generator.randint(1, 12))] for _ in range(20)]
    return [[1.0], [1, 1], [7, 3], [1e-9, 1], [1, 1, 1, 1e-3], [2] * 9, *several]


@pytest.mark.parametrize("shares", random_shares())
def test_every_source_has_its_share_at_every_moment(shares: list[float]) -> None:
    """Within its share of half a sample for each source, a half for rounding, one for the sources' order."""
    schedule = SourceSchedule(shares)
    counts = [0] * len(shares)
    for index in range(600):
        assert schedule.samples_per_source(index) == counts
        source, had = schedule.locate(index)
        assert had == counts[source]
        counts[source] += 1
        for count, share in zip(counts, shares, strict=True):
            due = (index + 1) * share / sum(shares)
            assert abs(count - due) <= 1.5 + len(shares) / 2 * share / sum(shares)


def test_far_along_the_stream_nothing_drifts() -> None:
    schedule, far = SourceSchedule([0.7, 0.2, 0.1]), 10**12
    assert schedule.samples_per_source(far) == pytest.approx([7 * 10**11, 2 * 10**11, 10**11], abs=300)
    places = [schedule.locate(far + i) for i in range(50)]
    for index, (source, had) in enumerate(places):
        assert schedule.samples_per_source(far + index)[source] == had
        assert schedule.samples_per_source(far + index + 1)[source] == had + 1


def test_golden_vectors() -> None:
    """Frozen: a change here reorders the data of every resumed run. Rename SCHEDULE if it has to be."""

    def places(shares: list[float], start: int = 0) -> list[tuple[int, int]]:
        return [SourceSchedule(shares).locate(index) for index in range(start, start + 10)]

    assert places([7, 3]) == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3), (0, 4), (0, 5), (1, 2), (0, 6)]
    assert places([0.5, 0.3, 0.2], 10**9) == [
        (0, 500000000),
        (1, 300000000),
        (0, 500000001),
        (2, 200000000),
        (0, 500000002),
        (1, 300000001),
        (0, 500000003),
        (2, 200000001),
        (0, 500000004),
        (1, 300000002),
    ]
    assert [source_seed(0, 0), source_seed(0, 1), source_seed(6198, 0)] == [
        4465119271719437173,
        942774424950526067,
        17276204240795588307,
    ]


def mixed(*parts: MixtureSource) -> DataConfig:
    return DataConfig(dir="root", mixture=list(parts))


def test_names_directories_and_weights() -> None:
    data = mixed(MixtureSource("web", weight=7), MixtureSource("/far/code", "python", weight=3))
    assert [(s.name, str(s.directory), s.weight, s.budget) for s in mixture_components(data)] == [
        ("web", "root/web", 7.0, None),
        ("python", "/far/code", 3.0, None),
    ]
    (alone,) = mixture_components(DataConfig(dir="root"))
    assert (alone.name, str(alone.directory)) == ("validation", "root")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([MixtureSource("a")], "data.mixture[0]: give either weight or tokens"),
        ([MixtureSource("a", weight=1, tokens=1)], "data.mixture[0]: give either weight or tokens"),
        ([MixtureSource("a", weight=0)], "data.mixture[0].weight=0: must be positive"),
        ([MixtureSource("a", tokens=-5)], "data.mixture[0].tokens=-5: must be positive"),
        (
            [MixtureSource("a", weight=1), MixtureSource("b", tokens=1)],
            "some sources have weights and others tokens",
        ),
        ([MixtureSource("x/a", weight=1), MixtureSource("y/a", weight=1)], "2 sources are named a"),
        ([MixtureSource("validation", weight=1)], "may not be named validation"),
    ],
)
def test_what_cannot_be_mixed(parts: list[MixtureSource], message: str) -> None:
    (found,) = mixture_errors(mixed(*parts))
    assert message in found


def test_sources_with_other_tokenizers_are_refused(tmp_path: Path) -> None:
    for name, mark in (("a", b"{}"), ("b", b"{ }")):
        write_prepared(tmp_path / name, [[2, 3]])
        manifest = tmp_path / name / "manifest.json"
        tokenizer = tmp_path / name / "tokenizer/tokenizer.json"
        before = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        tokenizer.write_bytes(mark)
        after = hashlib.sha256(mark).hexdigest()
        manifest.write_text(manifest.read_text().replace(before, after))
    data = DataConfig(dir=str(tmp_path), mixture=[MixtureSource(name, weight=1) for name in "ab"])
    with pytest.raises(
        UserError, match=r"b and a were prepared with different tokenizers \(tokenizer_sha256"
    ):
        read_manifests(data)


def test_seeds_differ() -> None:
    seeds = [source_seed(seed, position) for seed, position in itertools.product(range(20), repeat=2)]
    assert len(set(seeds)) == 400
