"""Checkpoints in an object store, over HTTP: what is complete, what a kill leaves, what is read."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmoe_train.checkpoint.directory import MANIFEST, checkpoint_path, entry_of, is_complete, verify
from olmoe_train.checkpoint.remote import (
    complete_steps,
    download_newest,
    remote_checkpoint,
    retire,
    upload_checkpoint,
)
from olmoe_train.utils import object_store
from olmoe_train.utils.object_store import join
from tests.support.s3 import BUCKET, Fault, FaultyS3

RUN = join(BUCKET, "runs", "one")
SIZE = 100_000


def saved(run_dir: Path, step: int) -> Path:
    """A complete checkpoint of three files of random bytes."""
    directory = checkpoint_path(run_dir, step)
    directory.mkdir(parents=True)
    files = {}
    for name in ("shard-00001.safetensors", "shard-00002.safetensors", "state.json"):
        (directory / name).write_bytes(os.urandom(SIZE))
        files[name] = entry_of(directory / name)
    (directory / MANIFEST).write_text(json.dumps({"files": files}))
    assert is_complete(directory)
    return directory


def steps() -> list[int]:
    return [step for step, _ in complete_steps(RUN)]


def test_a_checkpoint_comes_back_as_it_went_and_its_manifest_went_last(s3: FaultyS3, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "here", 7), saved(tmp_path / "here", 12)
    s3.faults = [Fault("500", "PUT.*shard-00001"), Fault("reset", "PUT.*state.json")]
    assert upload_checkpoint(first, RUN)
    puts = [line for line in s3.requests if line.startswith("PUT")]
    assert puts[-1].endswith(MANIFEST)
    assert len(puts) == 4 + 2
    assert not upload_checkpoint(first, RUN)
    upload_checkpoint(second, RUN)
    object_store.write(join(RUN, "metrics.jsonl"), b'{"step": 12}\n')
    assert steps() == [12, 7]

    s3.faults = [Fault("cut", "GET.*shard-00002"), Fault("reset", "GET.*state.json"), Fault("500", "GET")]
    there = tmp_path / "there"
    found = download_newest(RUN, there, lambda: None)
    assert found == checkpoint_path(there, 12)
    verify(found)
    assert (found / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()
    assert (there / "metrics.jsonl").read_text() == '{"step": 12}\n'
    assert download_newest(RUN, there, lambda: None) is None
    assert [path.name for path in (there / "checkpoints").iterdir()] == [found.name]


def test_an_upload_killed_in_the_middle_leaves_no_checkpoint(s3: FaultyS3, tmp_path: Path) -> None:
    upload_checkpoint(saved(tmp_path, 1), RUN)
    checkpoint = saved(tmp_path, 2)
    s3.faults = [Fault("stall", "PUT.*step-00000002/shard-00002")]
    code = (
        "import sys; from pathlib import Path; from olmoe_train.checkpoint.remote import upload_checkpoint; "
        "upload_checkpoint(Path(sys.argv[1]), sys.argv[2])"
    )
    uploading = subprocess.Popen([sys.executable, "-c", code, str(checkpoint), RUN])
    until = time.monotonic() + 60
    while not s3.count("PUT.*step-00000002/shard-00002") and time.monotonic() < until:
        time.sleep(0.02)
    uploading.send_signal(signal.SIGKILL)
    uploading.wait()
    assert object_store.list_files(remote_checkpoint(RUN, 2)).keys() >= {"shard-00001.safetensors"}
    assert steps() == [1]
    assert upload_checkpoint(checkpoint, RUN)
    assert steps() == [2, 1]


def test_while_a_checkpoint_is_replaced_there_is_none(s3: FaultyS3, tmp_path: Path) -> None:
    upload_checkpoint(saved(tmp_path / "first", 3), RUN)
    s3.faults = [Fault("403", "PUT.*state.json")]
    other = saved(tmp_path / "second", 3)
    with pytest.raises(ValueError, match="access is refused"):
        upload_checkpoint(other, RUN)
    assert steps() == []
    upload_checkpoint(other, RUN)
    ((_, manifest),) = complete_steps(RUN)
    assert manifest == (other / MANIFEST).read_bytes()


def test_a_checkpoint_damaged_in_the_store_is_named_and_the_one_before_is_taken(
    s3: FaultyS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 6, 7, 8):
        upload_checkpoint(saved(tmp_path / "here", step), RUN)
    object_store.write(join(remote_checkpoint(RUN, 8), MANIFEST), b"{")
    object_store.write(join(remote_checkpoint(RUN, 7), "state.json"), b"cut")
    object_store.write(join(remote_checkpoint(RUN, 6), "state.json"), b"x" * SIZE)
    with caplog.at_level(logging.WARNING):
        found = download_newest(RUN, tmp_path / "there", lambda: None)
    assert found == checkpoint_path(tmp_path / "there", 5)
    verify(found)
    assert "step-00000008: manifest.json is damaged; it is passed over" in caplog.text
    assert "step-00000006/state.json: damaged" in caplog.text
    assert "step-00000007" not in caplog.text  # incomplete: it does not exist


def test_an_interrupted_download_continues(
    s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = saved(tmp_path / "here", 4)
    upload_checkpoint(original, RUN)
    monkeypatch.setattr(object_store, "RANGE_BYTES", SIZE // 4)
    partial = tmp_path / "there" / "checkpoints" / ".step-00000004.download"
    partial.mkdir(parents=True)
    (partial / "state.json").write_bytes((original / "state.json").read_bytes()[: SIZE // 2])
    (partial / "shard-00001.safetensors").write_bytes(b"of another checkpoint")
    (partial / "other").write_bytes(b"")
    s3.requests.clear()
    found = download_newest(RUN, tmp_path / "there", lambda: None)
    assert found is not None
    verify(found)
    assert s3.count("GET.*state.json") == 2
    assert s3.count("GET.*shard-00001") == 4 + 4  # continued, found damaged, and read again


def test_retention_in_the_store_is_that_of_the_run_directory(s3: FaultyS3, tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30):
        upload_checkpoint(saved(tmp_path, step), RUN)
    s3.requests.clear()
    retire(RUN, keep=2, keep_every=20)
    assert steps() == [30, 25, 20]
    assert object_store.list_directories(join(RUN, "checkpoints")) == [
        f"step-000000{step}" for step in (20, 25, 30)
    ]
    deletions = [line for line in s3.requests if line.startswith("DELETE")]
    assert [line.endswith(MANIFEST) for line in deletions] == [True, False, False, False] * 2
    retire(RUN, keep=0, keep_every=0)
    assert steps() == [30, 25, 20]
