"""Saves that are cut off or fail: no finished checkpoint is lost, and the run ends as its twin did."""

import os
import resource
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from olmoe_train.checkpoint import directory, saver
from olmoe_train.checkpoint import sharded as training
from olmoe_train.checkpoint.directory import checkpoint_path, verify
from olmoe_train.config.train import TrainConfig
from tests.support.faults import (
    Fault,
    alerts,
    assert_same_end,
    at_step,
    config,
    run,
    same,
    saved_steps,
    saved_tensors,
    status,
)
from tests.support.ranks import RankError, run_ranks


def kill_at(function: str, part: str) -> None:
    """kill -9 rank 0 where checkpoint.training calls `function` with a path that has `part` in it."""
    original = getattr(training, function)

    def deadly(path: Path, *rest: Path) -> object:
        if part in str(path) and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *rest)

    setattr(training, function, deadly)


def kill_half_way_through_deleting() -> None:
    original = directory.shutil.rmtree

    def deadly(path: Path, **options: bool) -> None:
        if path.name.endswith(".deleting"):
            next(path.glob("shard-*")).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, **options)

    directory.shutil.rmtree = deadly


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        (partial(kill_at, "entry_of", "00000003.partial"), [1, 2]),  # there are shards, and no manifest
        (partial(kill_at, "publish_directory", "00000003.partial"), [1, 2]),  # all is there, but the name
        (kill_half_way_through_deleting, [2, 3]),  # at step 3 retention gives up step 1
    ],
    ids=["mid-save", "between write and rename", "during retention"],
)
def test_kill_9(data: Path, twin: Path, tmp_path: Path, fault: Fault, left: list[int]) -> None:
    cfg = config(data, tmp_path, checkpoint={"keep": 2})
    with pytest.raises(RankError, match="rank 0: died without a word, exit code -9"):
        run_ranks(2, run, cfg, fault)
    assert saved_steps(tmp_path) == left
    for step in left:
        verify(checkpoint_path(tmp_path, step))
    assert run_ranks(2, run, cfg) == [0, 0]
    assert_same_end(tmp_path, twin)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def limit_files(bytes_: int) -> None:
    """Files that this process writes may not be longer: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_disk_full_for_a_while(data: Path, twin: Path, tmp_path: Path, async_save: bool) -> None:
    cfg = config(data, tmp_path, checkpoint={"async_save": async_save})
    full = partial(at_step, 1, 3, partial(limit_files, 10_000))
    freed = partial(at_step, 1, 5, partial(limit_files, resource.RLIM_INFINITY))
    assert run_ranks(2, run, cfg, full, freed) == [0, 0]
    steps = saved_steps(tmp_path)
    assert (steps[0], steps[-1]) == (1, 6)
    assert 3 not in steps
    assert async_save or steps == [1, 2, 5, 6]  # else it depends on how long a save takes
    assert_same_end(tmp_path, twin)
    log = (tmp_path / "log.txt").read_text()
    assert "saving failed, 1 of at most 3 times in a row; training goes on" in log
    assert "File too large" in log
    assert alerts(tmp_path) == ["failed save"]


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_disk_full_for_good_ends_the_run(data: Path, tmp_path: Path, async_save: bool) -> None:
    cfg = config(
        data,
        tmp_path,
        trainer={"max_steps": 50},
        checkpoint={"async_save": async_save, "max_failures": 2},
    )
    with pytest.raises(RankError, match="2 saves failed in a row, the last one with:"):
        run_ranks(2, run, cfg, partial(at_step, 1, 3, partial(limit_files, 10_000)))
    assert saved_steps(tmp_path) in ([1, 2], [1])  # step 2 may still be on its way as the disk fills
    assert status(tmp_path)["state"] == "failed"
    assert "2 saves failed in a row" in status(tmp_path)["reason"]
    assert not list((tmp_path / "checkpoints").glob(".*"))  # half a checkpoint would keep the disk full


def wait_for_the_save_in_the_background() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("save step"):
            thread.join()


def test_a_save_that_failed_in_the_background_is_told_of_at_the_next_step(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, checkpoint={"async_save": True, "every": 2})
    full = partial(at_step, 1, 2, partial(limit_files, 10_000))
    freed = partial(at_step, 1, 4, partial(limit_files, resource.RLIM_INFINITY))
    ended = [partial(at_step, rank, 3, wait_for_the_save_in_the_background) for rank in (0, 1)]
    assert run_ranks(2, run, cfg, full, freed, *ended) == [0, 0]
    assert saved_steps(tmp_path) == [4, 6]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("saving failed") == 1
    assert log.index("step 2/6") < log.index("saving failed") < log.index("step 3/6")


def note_what_reaches_the_disk(noted: list[str]) -> None:
    sync, rename = os.fsync, os.rename

    def syncing(descriptor: int) -> None:
        noted.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    def renaming(source: Path, target: Path) -> None:
        noted.append(f"{source} becomes {target}")
        rename(source, target)

    os.fsync, os.rename = syncing, renaming


def save_and_note(cfg: TrainConfig) -> list[str]:
    noted: list[str] = []
    run(cfg, partial(note_what_reaches_the_disk, noted))
    return noted


def test_everything_is_on_the_disk_before_it_counts(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, trainer={"stop_at_step": 1})
    zero, one = run_ranks(2, save_and_note, cfg)
    final = checkpoint_path(tmp_path, 1)
    partial_ = final.with_name(f".{final.name}.partial")
    shards = sorted(path.name for path in final.glob("shard-*"))
    written = [shards[0], "state.json", "manifest.json"]
    rest = [str(partial_), f"{partial_} becomes {final}", str(final.parent)]
    assert [line for line in zero if "step-" in line or line == rest[-1]] == [
        *(str(partial_ / name) for name in written),
        *rest,
    ]
    assert [line for line in one if "step-" in line] == [str(partial_ / shards[1])]


def count_saves_at_a_time(most: list[int]) -> None:
    """The most saves that ever ran at the same time, into `most`; each takes long enough to meet another."""
    original, running, lock = saver.write_checkpoint, [0], threading.Lock()

    def counted(*arguments: Any) -> Path:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        try:
            time.sleep(0.2)
            return original(*arguments)
        finally:
            with lock:
                running[0] -= 1

    saver.write_checkpoint = counted


def run_counted(cfg: TrainConfig) -> int:
    most = [0]
    run(cfg, partial(count_saves_at_a_time, most))
    return most[0]


def test_async_saves_are_the_same_and_one_at_a_time(data: Path, twin: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, checkpoint={"async_save": True, "keep": 2, "keep_every": 3})
    assert run_ranks(2, run_counted, cfg) == [1, 1]
    assert saved_steps(tmp_path) == [3, 5, 6]
    assert same(saved_tensors(tmp_path, 3), saved_tensors(twin, 3))  # training had gone on meanwhile
    assert_same_end(tmp_path, twin)


def spoil_the_newest(step: int) -> None:
    """A bit of the checkpoint of `step` flips between its commit and retention."""
    original = training.write_checkpoint

    def spoiling(*arguments: Any) -> Path:
        path = original(*arguments)
        if path.name == f"step-{step:08d}" and dist.get_rank() == 0:
            shard = next(path.glob("shard-00001-*"))
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content)
        return path

    saver.write_checkpoint = spoiling


def test_nothing_is_deleted_for_a_successor_that_does_not_read_back(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, trainer={"stop_at_step": 4}, checkpoint={"keep": 2})
    run_ranks(2, run, cfg, partial(spoil_the_newest, 3))
    assert (
        "step-00000003: shard-00001-model-00001-of-00001.safetensors is damaged"
        in (tmp_path / "log.txt").read_text()
    )
    # Step 1 outlived the bad step 3, and went when step 4 had been read back.
    assert saved_steps(tmp_path) == [2, 4]
    assert (tmp_path / "checkpoints" / "step-00000003.damaged").is_dir()


def test_read_only_output_is_the_users_to_see(data: Path) -> None:
    with pytest.raises(RankError, match=r"UserError: run_dir=/sys/olmoe: cannot be written"):
        run_ranks(2, run, config(data, Path("/sys/olmoe")))


def exhaust_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    bytearray(2**28)


def test_out_of_memory_on_one_rank(data: Path, twin: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path)
    with pytest.raises(RankError, match=r"(?s)rank 1: .*MemoryError"):
        run_ranks(2, run, cfg, partial(at_step, 1, 4, exhaust_memory))
    assert status(tmp_path)["state"] == "failed"
    assert run_ranks(2, run, cfg) == [0, 0]
    assert_same_end(tmp_path, twin)
