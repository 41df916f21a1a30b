"""Prepared data in a store, over HTTP with faults: the tokens of the disk, through a bounded cache."""

import itertools
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig, MixtureSource
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.block_cache import BlockCache
from olmoe_train.data.loader import TrainingData, build_eval_batches, build_train_loader
from olmoe_train.data.mixture import mixture_components, read_manifests
from olmoe_train.data.remote import RemoteArray, local_directory
from olmoe_train.data.tokens import TokenSplit, open_split, verify_hashes
from olmoe_train.utils import object_store
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import join
from tests.support.data import add_loss_mask, write_prepared
from tests.support.s3 import BUCKET, Fault, FaultyS3

URL = join(BUCKET, "prepared", "web")
LENGTH = 64


@pytest.fixture
def local(tmp_path: Path) -> DataConfig:
    """20,880 training tokens in 2 shards: the first has some 21 blocks of 1 KiB."""
    documents = [[2 + (start * 31 + i * i) % 900 for i in range(50 + start)] for start in range(160)]
    directory = write_prepared(tmp_path / "web", documents, documents[:9], shard_tokens=11_000)
    return DataConfig(dir=str(directory), sequence_length=LENGTH)


def uploaded(directory: Path, url: str) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            object_store.upload(path, join(url, *path.relative_to(directory).parts))


@pytest.fixture
def remote(s3: FaultyS3, local: DataConfig, tmp_path: Path) -> DataConfig:
    uploaded(Path(local.dir), URL)
    s3.requests.clear()
    return replace(local, dir=URL, cache_dir=str(tmp_path / "cache"), cache_block_kib=1)


def batches_of(data: DataConfig, steps: int = 12) -> list[dict[str, torch.Tensor]]:
    loader = build_train_loader(TrainingData(data, 7), 3, BatchSizes(8), 0, 1, 8)
    validation = build_eval_batches(data, 0, 1, 4)
    return [*itertools.islice(loader, steps), *validation]


def assert_same_batches(mine: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(mine) == len(theirs) > 12
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_are_those_of_the_disk_whatever_the_store_does(
    s3: FaultyS3, local: DataConfig, remote: DataConfig, workers: int
) -> None:
    s3.faults = [
        Fault("500", "GET.*u16", times=3),
        Fault("reset", "GET.*(u16|npy)", times=2),
        Fault("cut", "GET.*(npy|u64)", times=3),
        Fault("slow", "GET.*npy", times=1),
    ]
    changes: dict[str, Any] = {"mask_documents": True, "num_workers": workers}
    expected = batches_of(replace(local, **changes))
    assert_same_batches(batches_of(replace(remote, **changes)), expected)
    assert TrainingData(local, 7).fingerprint() == TrainingData(remote, 7).fingerprint()
    if workers == 0:
        s3.requests.clear()
        assert_same_batches(batches_of(replace(remote, **changes)), expected)
        assert s3.count("GET.*shard") == 0  # all from the cache


def test_a_start_reads_the_manifest_and_no_shard(s3: FaultyS3, remote: DataConfig) -> None:
    split = open_split(local_directory(remote, remote.dir), "train")
    assert s3.count("GET.*shard") == 0
    assert s3.count("GET.*manifest.json") == 1
    border = split.shards[0].tokens
    split.read(border - 10, border + 10)  # of the last block of a shard and the first of the next
    assert s3.count("GET.*shard") == 2


def test_masks_packing_and_mixtures_read_the_same(s3: FaultyS3, tmp_path: Path) -> None:
    for name, start in (("a", 2), ("b", 500)):
        documents = [[start + (i * 7 + n) % 400 for i in range(20 + n)] for n in range(40)]
        directory = write_prepared(tmp_path / "all" / name, documents, documents[:2])
        tokens = sum(len(document) + 1 for document in documents)
        add_loss_mask(directory, "train", [i % 3 != 0 for i in range(tokens)])
    uploaded(tmp_path / "all", join(BUCKET, "all"))
    mixture = [MixtureSource("a", weight=2), MixtureSource("b", weight=1)]
    here = DataConfig(
        dir=str(tmp_path / "all"), mixture=mixture, sequence_length=LENGTH, packing=Packing.best_fit
    )
    there = replace(here, dir=join(BUCKET, "all"), cache_dir=str(tmp_path / "cache"), cache_block_kib=1)
    assert [one.name for one in mixture_components(there)] == ["a", "b"]
    mine, theirs = (
        list(itertools.islice(build_train_loader(TrainingData(one, 7), 0, BatchSizes(8), 0, 1, 8), 13))
        for one in (there, here)
    )
    assert_same_batches(mine, theirs)


def blocks_of(remote: DataConfig) -> list[Path]:
    return sorted(
        path for path in (Path(str(remote.cache_dir)) / "blocks").glob("*/*") if path.suffix != ".tmp"
    )


def test_a_damaged_block_is_fetched_again(
    s3: FaultyS3, local: DataConfig, remote: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    directory = local_directory(remote, remote.dir)
    expected = open_split(local.dir, "train").read(0, 5_000)
    assert np.array_equal(open_split(directory, "train").read(0, 5_000), expected)
    blocks = blocks_of(remote)
    assert len(blocks) == 10
    content = bytearray(blocks[4].read_bytes())
    content[100] ^= 1
    blocks[4].write_bytes(content)
    blocks[5].write_bytes(blocks[5].read_bytes()[:7])
    s3.requests.clear()
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(open_split(directory, "train").read(0, 5_000), expected)
    assert s3.count("GET.*shard") == 2
    assert caplog.text.count("is damaged: it is fetched again") == 2


def test_the_cache_stays_within_its_limit_and_forgets_what_was_not_used(tmp_path: Path) -> None:

    def lost() -> bytes:
        raise AssertionError("the block in use was deleted")

    limit, size = 80_000, 500  # a process looks again after 1/128: 625 bytes
    for name in ("a", "b"):  # two processes
        cache = BlockCache(tmp_path, limit)
        for number in range(200):
            cache.get(f"{name}{number:04d}", lambda: os.urandom(size))
            BlockCache(tmp_path, limit).get("a0000", (lambda: b"") if number == 0 else lost)
            if number % 10 == 0:
                total = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
                assert total <= limit
    assert total > limit * 3 // 4
    kept = {path.name for path in tmp_path.glob("*/*")}
    assert {"a0000", "b0199"} <= kept
    assert "b0000" not in kept


def test_temporary_files_of_dead_processes_are_deleted(tmp_path: Path) -> None:
    old, new = tmp_path / "ab" / ".x.tmp", tmp_path / "ab" / ".y.tmp"
    old.parent.mkdir()
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 4_000,) * 2)
    BlockCache(tmp_path, 1_000).get("abcd", lambda: b"x")
    assert not old.exists()
    assert new.exists()


def test_a_shard_that_changed_in_the_store_is_named(s3: FaultyS3, remote: DataConfig, tmp_path: Path) -> None:
    directory = local_directory(remote, remote.dir)
    assert verify_hashes(directory) == 2 * (2 + 1)
    (array,) = {open_split(directory, "validation").shards[0].path}
    size = object_store.list_files(join(URL, "validation"))[Path(array).name]
    object_store.write(join(URL, array), b"\1" * size)
    elsewhere = replace(remote, cache_dir=str(tmp_path / "other"))
    with pytest.raises(UserError, match=f"{URL}/{array}: its contents changed since"):
        verify_hashes(local_directory(elsewhere, URL))
    object_store.write(join(URL, array), b"\1")
    with pytest.raises(UserError, match=f"{URL}/{array}: 1 bytes, but manifest.json says"):
        open_split(local_directory(elsewhere, URL), "validation")


def test_data_that_is_not_there_is_named_with_the_way_to_bring_it(s3: FaultyS3, remote: DataConfig) -> None:
    with pytest.raises(UserError, match=r"(?s)data.dir=s3://bucket/none: no prepared data.*olmoe prepare"):
        read_manifests(replace(remote, dir=join(BUCKET, "none")))


def test_indexes_are_those_of_memory_maps(remote: DataConfig, local: DataConfig) -> None:
    mine, theirs = (open_split(local_directory(data, data.dir), "train") for data in (remote, local))
    assert isinstance(mine, TokenSplit)
    array = mine._map(mine.shards[0].ends_path, np.dtype("<u8"))
    assert isinstance(array, RemoteArray)
    for document in (0, 1, 57, 159):
        assert mine.document(document) == theirs.document(document)
    for position in (0, 50, 51, 10_500, 15_000, len(theirs) - 1):
        assert mine.document_at(position) == theirs.document_at(position)
    assert np.array_equal(mine.document_starts(40, 12_000), theirs.document_starts(40, 12_000))
    assert len(array[3:3]) == 0
    assert int(array[-1]) == theirs.shards[0].tokens
