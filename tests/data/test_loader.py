"""One global stream of samples, whatever the ranks, workers, micro-batches and restarts."""

import dataclasses
import itertools
import json
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig, MixtureSource
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import TrainingData, TrainSamples, build_eval_batches, build_train_loader
from olmoe_train.data.sample_order import sample_for
from olmoe_train.data.shares import source_shares
from olmoe_train.data.tokens import open_split
from olmoe_train.model.cross_entropy import IGNORE_INDEX
from olmoe_train.utils.errors import UserError
from tests.support.data import EOS, PAD, add_loss_mask, write_prepared

S = 4  # tokens a sequence
SAMPLES = 21
SEED = 7
G = 8  # sequences a step


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Training: 21 samples and a tail of 3 tokens, in 3 shards. Validation: 11 tokens, 2 sequences and 3."""
    numbers = list(range(2, 2 + SAMPLES * S + 3))
    documents = [numbers[:20], numbers[21:50], numbers[51:-1]]  # each end replaces one number
    directory = write_prepared(
        tmp_path_factory.mktemp("loader") / "data", documents, [list(range(100, 110))], shard_tokens=40
    )
    return DataConfig(dir=str(directory), sequence_length=S)


def rank_steps(
    data: DataConfig, start: int, steps: int, rank: int, world: int, micro: int
) -> list[torch.Tensor]:
    """The rows of each step of one rank: [G / world, S] each."""
    batches = iter(build_train_loader(TrainingData(data, SEED), start, BatchSizes(G), rank, world, micro))
    per_step = G // (world * micro)
    result = []
    for _ in range(steps):
        rows = [batch["input_ids"] for batch in itertools.islice(batches, per_step)]
        assert all(part.shape == (micro, S) and part.dtype == torch.int64 for part in rows)
        result.append(torch.cat(rows))
    return result


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_one_global_stream(data: DataConfig, world: int, micro: int, workers: int) -> None:
    """6 steps of 8, more than two epochs of 21; stopped after step 3 and started anew there."""
    tokens = open_split(data.dir, "train")
    starts = [sample_for(index, SAMPLES, SEED) * S for index in range(6 * G)]
    expected = torch.tensor(np.array([tokens.read(start, start + S) for start in starts])).view(6, G, S)
    config = dataclasses.replace(data, num_workers=workers)
    ranks = [
        rank_steps(config, 0, 3, rank, world, micro) + rank_steps(config, 3 * G, 3, rank, world, micro)
        for rank in range(world)
    ]
    for step in range(6):
        assert torch.equal(torch.cat([steps[step] for steps in ranks]), expected[step])


def columns_of_steps(
    data: DataConfig, start: int, steps: int, rank: int, world: int, micro: int
) -> list[list[dict[str, torch.Tensor]]]:
    """The rows of each step of one rank, a dict of columns each; document_offsets as the row's own starts."""
    batches = iter(build_train_loader(TrainingData(data, SEED), start, BatchSizes(G), rank, world, micro))
    result = []
    for _ in range(steps):
        rows = []
        for batch in itertools.islice(batches, G // (world * micro)):
            offsets = batch.pop("document_offsets")
            assert (offsets.dtype, offsets[0], offsets[-1]) == (torch.int32, 0, micro * S)
            for row in range(micro):
                own = offsets[(offsets >= row * S) & (offsets < (row + 1) * S)] - row * S
                rows.append({name: column[row] for name, column in batch.items()} | {"starts": own})
        result.append(rows)
    return result


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three sources of short documents, one with a loss mask and one that repeats itself; packed, masked and
    filtered."""
    root = tmp_path_factory.mktemp("everything")
    generator = np.random.default_rng(0)
    for name, low in (("a", 2), ("b", 300), ("c", 600)):
        documents = [generator.integers(low, low + 200, n).tolist() for n in generator.integers(1, 2 * S, 30)]
        write_prepared(root / name, documents)
    tokens = len(open_split(root / "b", "train"))
    add_loss_mask(root / "b", "train", generator.integers(0, 2, tokens).tolist())
    mixture = [MixtureSource("a", weight=5), MixtureSource("b", weight=2), MixtureSource("c", weight=1)]
    return DataConfig(
        dir=str(root),
        mixture=mixture,
        sequence_length=S,
        packing=Packing.best_fit,
        mask_documents=True,
        repetition_filter=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_one_global_stream_of_packed_masked_mixtures(
    everything: DataConfig, world: int, micro: int, workers: int
) -> None:
    samples = TrainSamples(everything, SEED)
    config = dataclasses.replace(everything, num_workers=workers)
    ranks = [
        columns_of_steps(config, 0, 3, rank, world, micro)
        + columns_of_steps(config, 3 * G, 3, rank, world, micro)
        for rank in range(world)
    ]
    for step in range(6):
        rows = [row for steps in ranks for row in steps[step]]
        assert len(rows) == G
        for index, row in enumerate(rows):
            expected = samples[step * G + index]
            assert row.pop("starts").tolist() == expected.pop("document_starts").tolist()
            assert row.keys() == expected.keys()
            for name, column in row.items():
                assert torch.equal(column, torch.from_numpy(expected[name])), (step, index, name)


def test_sources_keep_their_shares_and_their_own_epochs(everything: DataConfig) -> None:
    """Every source goes through its packs epoch by epoch; tokens are shared out as the weights say."""
    samples = TrainSamples(everything, SEED)
    drawn = [samples[index] for index in range(200)]
    tokens = {"a": 0, "b": 0, "c": 0}
    rows: dict[str, list[bytes]] = {name: [] for name in tokens}
    for sample in drawn:
        real = sample["input_ids"][sample["attention_mask"] == 1]
        name = "abc"[int(real[real != EOS][0]) // 300]
        tokens[name] += len(real)
        rows[name].append(sample["input_ids"].tobytes())
    shares = source_shares(samples, 200)
    for name, weight in (("a", 5), ("b", 2), ("c", 1)):
        assert shares[name]["requested_share"] == weight / 8
        assert shares[name]["share"] == pytest.approx(weight / 8, abs=0.02)
        assert tokens[name] / sum(tokens.values()) == pytest.approx(shares[name]["share"], abs=0.02)
        sequences = samples.sequences["abc".index(name)]
        size = len(sequences)
        assert shares[name]["epochs"] == len(rows[name]) / size
        every = sorted(sequences.sample(i)["input_ids"].tobytes() for i in range(size))
        for epoch in range(len(rows[name]) // size):
            assert sorted(rows[name][epoch * size : (epoch + 1) * size]) == every
    assert shares["a"]["epochs"] > 1


def test_shares_are_of_tokens_even_where_sequences_differ_in_padding(tmp_path: Path) -> None:
    """Sequences of 4 tokens and of 3: as many tokens of each take four of the one for three of the other."""
    write_prepared(tmp_path / "full", [[2, 2, 2]] * 9)
    write_prepared(tmp_path / "slack", [[3, 3]] * 9)
    mixture = [MixtureSource(name, weight=1) for name in ("full", "slack")]
    data = DataConfig(dir=str(tmp_path), mixture=mixture, sequence_length=S, packing=Packing.best_fit)
    samples = TrainSamples(data, SEED)
    assert samples.schedule.samples_per_source(700) == [300, 400]
    assert {name: share["share"] for name, share in source_shares(samples, 700).items()} == {
        "full": 0.5,
        "slack": 0.5,
    }


def test_sources_of_one_size_have_orders_of_their_own(tmp_path: Path) -> None:
    write_prepared(tmp_path / "a", [list(range(2, 2 + 40 * S))])
    mixture = [MixtureSource("a", name, weight=1) for name in ("one", "two")]
    data = DataConfig(dir=str(tmp_path), mixture=mixture, sequence_length=S)
    firsts = [int(TrainSamples(data, SEED)[i]["input_ids"][0]) for i in range(40)]
    places = [TrainSamples(data, SEED).schedule.locate(i)[0] for i in range(40)]
    orders = [[first for first, source in zip(firsts, places, strict=True) if source == s] for s in (0, 1)]
    assert len(orders[0]) == 20
    assert orders[0] != orders[1]


def test_an_epoch_is_all_samples_or_the_budgets(data: DataConfig, tmp_path: Path) -> None:
    assert TrainSamples(data, SEED).epoch == SAMPLES
    write_prepared(tmp_path / "a", [[2] * 99])
    write_prepared(tmp_path / "b", [[2] * 7])
    mixture = [MixtureSource("a", tokens=30), MixtureSource("b", tokens=13)]
    mixed = DataConfig(dir=str(tmp_path), mixture=mixture, sequence_length=S)
    assert TrainSamples(mixed, SEED).epoch == 11  # 43 tokens in sequences of 4
    alone = dataclasses.replace(mixed, mixture=mixture[:1])
    assert TrainSamples(alone, SEED).epoch == 8  # of a budget, too
    packed = dataclasses.replace(data, packing=Packing.best_fit)
    assert TrainSamples(packed, SEED).epoch == len(TrainSamples(packed, SEED).sequences[0]) == 22


def test_an_epoch_has_every_sample_once(data: DataConfig) -> None:
    loader = build_train_loader(
        TrainingData(data, SEED), 0, BatchSizes(1), rank=0, world_size=1, micro_batch_size=1
    )
    tokens = open_split(data.dir, "train")
    expected = sorted(tokens.read(i * S, i * S + S).tolist() for i in range(SAMPLES))
    assert sorted(batch["input_ids"][0].tolist() for batch in itertools.islice(loader, SAMPLES)) == expected


def test_another_batch_size_goes_on_where_the_last_one_stopped(data: DataConfig) -> None:
    """Elastic restart: the state is a sample index, not a step."""
    first = build_train_loader(TrainingData(data, SEED), 0, BatchSizes(8), 0, 1, 8)
    then = build_train_loader(TrainingData(data, SEED), 8, BatchSizes(3), 0, 1, 3)
    whole = build_train_loader(TrainingData(data, SEED), 0, BatchSizes(11), 0, 1, 11)
    parts = [next(iter(first))["input_ids"], next(iter(then))["input_ids"]]
    assert torch.equal(torch.cat(parts), next(iter(whole))["input_ids"])


def test_targets_are_the_next_inputs_and_the_seed_decides_the_order(data: DataConfig) -> None:
    batch = next(iter(build_train_loader(TrainingData(data, 1), 0, BatchSizes(8), 0, 1, 8)))
    assert set(batch) == {"input_ids", "targets"}
    assert torch.equal(batch["input_ids"][:, 1:], batch["targets"][:, :-1])
    assert (batch["targets"][:, -1] == IGNORE_INDEX).all()
    other = next(iter(build_train_loader(TrainingData(data, 2), 0, BatchSizes(8), 0, 1, 8)))
    assert not torch.equal(batch["input_ids"], other["input_ids"])


def test_loading_leaves_the_global_random_state_alone(data: DataConfig) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(
        iter(
            build_train_loader(
                TrainingData(dataclasses.replace(data, num_workers=1), SEED), 0, BatchSizes(8), 0, 1, 8
            )
        )
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_split_shorter_than_a_sequence(data: DataConfig) -> None:
    with pytest.raises(
        UserError, match=r"data\.sequence_length=88 is longer than the whole training split \(87 tokens\)"
    ):
        build_train_loader(
            TrainingData(dataclasses.replace(data, sequence_length=88), SEED), 0, BatchSizes(8), 0, 1, 8
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_loading_is_a_user_error(tmp_path: Path, workers: int) -> None:
    directory = write_prepared(tmp_path / "data", [[2, 3, 99]], vocab_size=99)
    config = DataConfig(dir=str(directory), sequence_length=4, num_workers=workers)
    batches = iter(build_train_loader(TrainingData(config, SEED), 0, BatchSizes(1), 0, 1, 1))
    with pytest.raises(UserError, match=r"npy: token 2 is 99, beyond the vocabulary of 99") as caught:
        next(batches)
    # The traceback keeps the iterator alive; collected late, torch takes 5 s to end its workers.
    traceback.clear_frames(caught.tb)
    del batches


@pytest.mark.parametrize(
    ("world", "micro", "steps"), [(1, 1, 3), (1, 2, 2), (1, 8, 1), (2, 1, 2), (3, 1, 1), (4, 2, 1)]
)
def test_validation_covers_every_token_once(data: DataConfig, world: int, micro: int, steps: int) -> None:
    """11 tokens in sequences of 4: two full ones and one of 3."""
    ranks = [list(build_eval_batches(data, rank, world, micro)) for rank in range(world)]
    assert [len(batches) for batches in ranks] == [steps] * world
    rows = [
        {name: batch[name][row] for name in batch}
        for step in range(steps)
        for batches in ranks
        for batch in [batches[step]]
        for row in range(micro)
    ]
    real = [row["input_ids"][row["attention_mask"].bool()].tolist() for row in rows]
    filler: list[list[int]] = [[]] * (world * micro * steps - 3)
    assert real == [[100, 101, 102, 103], [104, 105, 106, 107], [108, 109, EOS], *filler]
    for row in rows:
        assert row["input_ids"].shape == row["targets"].shape == row["attention_mask"].shape == (S,)
        predicts = torch.cat([row["attention_mask"][1:], torch.zeros(1)]) == 1
        assert torch.equal(row["targets"] != IGNORE_INDEX, predicts)
        assert torch.equal(row["input_ids"] == PAD, row["attention_mask"] == 0)
        assert torch.equal(row["targets"][predicts], row["input_ids"].roll(-1)[predicts])


def test_validation_with_workers_and_a_limit(data: DataConfig) -> None:
    config = dataclasses.replace(data, num_workers=2)
    batches = list(build_eval_batches(config, rank=1, world_size=2, micro_batch_size=1, max_sequences=2))
    assert [batch["input_ids"].tolist() for batch in batches] == [[[104, 105, 106, 107]]]
    assert (
        sum(int(b["attention_mask"].sum()) for b in build_eval_batches(data, 0, 1, 2, max_sequences=1)) == 4
    )


def test_validation_pads_with_eos_where_there_is_no_padding_token(tmp_path: Path) -> None:
    directory = write_prepared(tmp_path / "data", [[2]], [[3]], pad_token_id=None)
    (batch,) = build_eval_batches(DataConfig(dir=str(directory), sequence_length=4), 0, 1, 1)
    assert batch["input_ids"].tolist() == [[3, EOS, EOS, EOS]]
    assert batch["targets"].tolist() == [[EOS, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]


def test_no_validation_split(tmp_path: Path) -> None:
    directory = write_prepared(tmp_path / "data", [[2, 3]])
    with pytest.raises(UserError, match=r"validation split is empty(.|\n)*validation_fraction above 0"):
        build_eval_batches(DataConfig(dir=str(directory), sequence_length=2), 0, 1, 1)


def test_fingerprint_follows_what_decides_the_stream(data: DataConfig, tmp_path: Path) -> None:
    base = TrainingData(data, SEED).fingerprint()
    assert json.loads(json.dumps(base)) == base
    moved = shutil.copytree(data.dir, tmp_path / "moved")
    assert (
        TrainingData(DataConfig(dir=str(moved), sequence_length=S, num_workers=3), SEED).fingerprint() == base
    )
    assert TrainingData(data, SEED + 1).fingerprint() != base
    assert TrainingData(dataclasses.replace(data, sequence_length=5), SEED).fingerprint() != base
    assert TrainingData(dataclasses.replace(data, packing=Packing.best_fit), SEED).fingerprint() != base
    assert (
        TrainingData(
            dataclasses.replace(data, mask_documents=True, repetition_filter=True), SEED
        ).fingerprint()
        == base
    )
    other = write_prepared(tmp_path / "other", [list(range(2, 88))])  # as many tokens, in other shards
    assert TrainingData(dataclasses.replace(data, dir=str(other)), SEED).fingerprint() != base


def test_fingerprint_of_a_mixture_names_what_changed(everything: DataConfig) -> None:
    base = TrainingData(everything, SEED).fingerprint()
    assert json.loads(json.dumps(base)) == base

    def changed(*mixture: MixtureSource) -> set[str]:
        other = TrainingData(dataclasses.replace(everything, mixture=list(mixture)), SEED).fingerprint()
        return {key for key in base.keys() | other.keys() if base.get(key) != other.get(key)}

    a, b, c = everything.mixture
    in_tokens = [MixtureSource("a", tokens=50), MixtureSource("b", tokens=20), MixtureSource("c", tokens=10)]
    assert changed(*in_tokens) == set()  # the same proportions
    heavier = changed(a, b, MixtureSource("c", weight=2))
    assert heavier == {"mixture.a.share", "mixture.b.share", "mixture.c.share"}
    moved = changed(a, b, MixtureSource("a", "c", weight=1))
    assert moved == {"mixture.c.train_tokens", "mixture.c.train_sha256"}
    assert changed(b, a, c) == {"mixture"}
    assert "mixture.c.share" in changed(a, b)


def test_a_source_shorter_than_a_sequence_is_named(everything: DataConfig) -> None:
    long = dataclasses.replace(everything, sequence_length=10_000, packing=Packing.concat)
    with pytest.raises(
        UserError, match=r"data\.sequence_length=10000 is longer than the training split of a"
    ):
        TrainSamples(long, SEED)
