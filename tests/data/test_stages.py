"""Data in stages: borders exact to the sample on every layout, sources that continue, and what may change."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from olmoe_train.config.data import DataConfig, DataStage, MixtureSource
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.fingerprint import stream_changes
from olmoe_train.data.loader import RankMicroBatches, TrainingData, TrainSamples
from olmoe_train.data.mixture import mixture_components, source_seed
from olmoe_train.data.sample_order import sample_for
from olmoe_train.data.shares import source_shares, stage_shares
from olmoe_train.data.source_errors import mixture_errors
from olmoe_train.data.stages import StagedSchedule
from tests.support.data import write_prepared

S, SEED, SIZE = 4, 7, 12  # tokens per sequence; sequences of each source


def mixed(*names: str) -> DataStage:
    return DataStage(mixture=[MixtureSource(name, weight=1) for name in names])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Sequences 0 to 6 of a alone, 7 to 12 of a and b by halves, then b and c by halves."""
    root = tmp_path_factory.mktemp("stages")
    for name, low in (("a", 100), ("b", 200), ("c", 300)):
        write_prepared(root / name, [[low + number] * (S - 1) for number in range(SIZE)])
    stages = [DataStage(7 * S, dir="a"), replace(mixed("a", "b"), until_tokens=13 * S), mixed("b", "c")]
    return DataConfig(dir=str(root), sequence_length=S, stages=stages)


def test_sources_continue_where_the_stage_before_left_off() -> None:
    """Three stages of the sources 0 and 1, worked by hand; those of one stage take turns, the first first."""
    schedule = StagedSchedule(3, [0, 2, 6], [{0: 1.0}, {0: 1.0, 1: 1.0}, {1: 1.0, 2: 1.0}])
    found = [schedule.locate(index) for index in range(10)]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (0, 3), (1, 1), (1, 2), (2, 0), (1, 3), (2, 1)]
    assert [schedule.stage_of(index) for index in range(8)] == [0, 0, 1, 1, 1, 1, 2, 2]
    for count in range(11):
        expected = [sum(source == one for source, _ in found[:count]) for one in range(3)]
        assert schedule.samples_per_source(count) == expected
    far = 10**12
    assert schedule.locate(far) == (1, 2 + (far - 6) // 2)


@pytest.mark.parametrize("start", range(0, 24, 3))
def test_one_stream_on_every_layout_from_every_step(data: DataConfig, start: int) -> None:
    """Steps of 4 sequences on 1, 2 and 4 ranks: a border lies inside of step 1, of a rank's share, and of a
    micro-batch."""
    samples, size = TrainSamples(data, SEED), 4
    stream = [samples.place(index) for index in range(start, start + 3 * size)]
    for world, micro in ((1, 4), (1, 1), (2, 2), (2, 1), (4, 1)):
        ranks = [
            itertools.islice(
                RankMicroBatches(start, BatchSizes(size), rank, world, micro), 3 * size // (world * micro)
            )
            for rank in range(world)
        ]
        steps: list[list[tuple[int, int]]] = [[], [], []]
        for batches in ranks:
            for number, indices in enumerate(batches):
                steps[number * micro * world // size] += [samples.place(index) for index in indices]
        assert [place for step in steps for place in step] == stream


def test_each_source_is_one_permutation_through_all_stages(data: DataConfig) -> None:
    samples, drawn = TrainSamples(data, SEED), {name: list[int]() for name in "abc"}
    for index in range(60):
        token = int(samples[index]["input_ids"][0])
        drawn["abc"[token // 100 - 1]].append(token % 100)
    seeds = {
        "a": SEED,
        "b": source_seed(SEED, 1),
        "c": source_seed(SEED, 2),
    }  # the run begins with data.dir=a
    for name, numbers in drawn.items():
        assert numbers == [sample_for(index, SIZE, seeds[name]) for index in range(len(numbers))]
    assert [len(drawn[name]) for name in "abc"] == [10, 27, 23]  # 7 + 3, 3 + 24, 23


def test_shares_by_hand(data: DataConfig) -> None:
    samples = TrainSamples(data, SEED)
    shares = source_shares(samples, 10)  # 7 of a, then 3 of a and b
    assert [shares[name]["share"] for name in "abc"] == [0.9, 0.1, 0.0]
    assert [shares[name]["requested_share"] for name in "abc"] == pytest.approx([0.85, 0.15, 0.0])
    now = stage_shares(samples, samples.stages[1], 10)
    assert [now[name]["stage_share"] for name in "abc"] == pytest.approx([2 / 3, 1 / 3, 0.0])
    assert [now[name]["requested_stage_share"] for name in "abc"] == [0.5, 0.5, 0.0]
    whole = stage_shares(samples, samples.stages[1], 40)
    assert [whole[name]["stage_share"] for name in "abc"] == [0.5, 0.5, 0.0]


def test_only_what_was_drawn_is_compared(data: DataConfig) -> None:
    def changed(before: DataConfig, now: DataConfig, samples: int) -> set[str]:
        first, second = (TrainingData(one, SEED).fingerprint() for one in (before, now))
        found = set(stream_changes(first, second, samples))
        if not found:  # the promise: those samples are the same
            places = [TrainSamples(one, SEED) for one in (before, now)]
            drawn = [[one[i]["input_ids"].tolist() for i in range(samples)] for one in places]
            assert drawn[0] == drawn[1]
        return found

    first, second, third = data.stages
    assert changed(data, data, 20) == set()
    other = replace(data, stages=[first, second, mixed("a", "c")])
    assert changed(data, other, 13) == set()  # the third stage has not begun
    assert "stages.3.mixture" in changed(data, other, 14)
    longer = replace(data, stages=[first, replace(second, until_tokens=15 * S), third])
    assert changed(data, longer, 13) == set()
    assert "stages.2.until_sample" in changed(data, longer, 14)
    # A run on one directory, or on a mixture, gets stages later.
    alone = replace(data, dir=f"{data.dir}/a", stages=[])
    assert changed(alone, data, 7) == set()
    assert changed(alone, data, 8) != set()
    halves = replace(data, stages=[], mixture=second.mixture)
    annealed = replace(data, stages=[replace(second, until_tokens=9 * S), first])
    assert changed(halves, replace(annealed, stages=[*annealed.stages[:1], third]), 9) == set()
    # One directory as a mixture has another order.
    assert "stages.1.mixture" in changed(
        data, replace(data, stages=[replace(mixed("a"), until_tokens=28)]), 5
    )


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([DataStage(4)], "data.stages[0]: give either dir or mixture; it has dir=None and 0 sources"),
        ([replace(mixed("a"), dir="a")], "data.stages[0]: give either dir or mixture; it has dir=a and 1"),
        ([DataStage(mixture=[MixtureSource("a", tokens=4)])], "data.stages[0].mixture: tokens of a source"),
        ([DataStage(mixture=[MixtureSource("a", weight=0)])], "data.stages[0].mixture[0].weight=0: must be"),
        ([DataStage(4, dir="x/a"), mixed("y/a")], "data.stages[1]: a is root/y/a, and"),
        (
            [DataStage(4, dir="a"), DataStage(mixture=[MixtureSource("../root/a", "b", weight=1)])],
            "data.stages[1]: root/../root/a is named b, and a in data.stages[0]",
        ),
        ([DataStage(dir="validation")], "data.stages[0]: a source may not be named validation"),
    ],
)
def test_what_cannot_be_a_stage(stages: list[DataStage], message: str) -> None:
    (found,) = mixture_errors(DataConfig(dir="root", stages=stages))
    assert message in found


def test_sources_of_stages_come_once_in_order(tmp_path: Path) -> None:
    data = DataConfig(dir=str(tmp_path), stages=[mixed("b", "a"), mixed("a", "c"), DataStage(dir=".")])
    assert [one.name for one in mixture_components(data)] == ["b", "a", "c", tmp_path.name]
