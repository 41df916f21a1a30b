"""Files that appear whole or not at all, whatever interrupts their writing."""

import os
import stat
import threading
from pathlib import Path

import pytest

from olmoe_train.utils import files
from olmoe_train.utils.files import (
    atomic_directory,
    atomic_write_text,
    file_lock,
    read_json_object,
    write_json,
)


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    with atomic_directory(final) as partial:
        (partial / "weights").write_bytes(b"1")
        (partial / "weights").chmod(0o600)  # as safetensors leaves its files
        assert not final.exists()
    assert (final / "weights").read_bytes() == b"1"
    (tmp_path / "reference").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    assert stat.S_IMODE((final / "weights").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "reference").stat().st_mode
    )
    assert stat.S_IMODE(final.stat().st_mode) == stat.S_IMODE((tmp_path / "directory").stat().st_mode)
    assert [path.name for path in final.parent.iterdir()] == ["model"]


def test_nothing_is_left_of_a_directory_whose_block_fails(tmp_path: Path) -> None:
    killed = tmp_path / ".model.0123abcd.partial"
    killed.mkdir()
    (killed / "weights").write_bytes(b"1")

    def half_a_write(directory: Path) -> None:
        (directory / "weights").write_bytes(b"1")
        raise KeyError

    with pytest.raises(KeyError), atomic_directory(tmp_path / "model") as partial:
        half_a_write(partial)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_directory_are_replaced_and_the_decisive_one_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "model"
    final.mkdir()
    for name in ("a.json", "config.json", "kept"):
        (final / name).write_text("old")
    moved = []
    replace = Path.replace

    def note(path: Path, target: Path) -> Path:
        moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note)
    with atomic_directory(final, last="config.json") as partial:
        for name in ("z.json", "a.json", "config.json"):
            (partial / name).write_text("new")
    assert sorted(moved[:2]) == ["a.json", "z.json"]
    assert moved[2:] == ["config.json"]
    contents = {path.name: path.read_text() for path in final.iterdir()}
    assert contents == {"a.json": "new", "z.json": "new", "config.json": "new", "kept": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = files.fsync_path, Path.rename

    def note_fsync(path: Path) -> None:
        events.append("fsync parent" if path == tmp_path else f"fsync {path.suffix or path.name}")
        fsync(path)

    def note_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(files, "fsync_path", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    with atomic_directory(tmp_path / "model") as partial:
        (partial / "weights").write_bytes(b"1")
    assert events == ["fsync weights", "fsync .partial", "rename", "fsync parent"]


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    atomic_write_text(path, "old")
    atomic_write_text(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "größer"
    assert [found.name for found in tmp_path.iterdir()] == ["status.json"]


def test_text_written_by_several_threads_is_that_of_one(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=atomic_write_text, args=(tmp_path / "x", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_text() in texts
    assert [found.name for found in tmp_path.iterdir()] == ["x"]


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    order: list[str] = []

    def wait() -> None:
        with file_lock(tmp_path / "lock"):
            order.append("second")

    with file_lock(tmp_path / "lock"):
        with pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", wait=False):
            order.append("never")
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_json_objects(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": [2]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    assert read_json_object(tmp_path / "x.json") == {"a": [2], "b": 1}
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"x\.json: expected a JSON object, found a JSON list"):
        read_json_object(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: not valid JSON"):
        read_json_object(tmp_path / "x.json")
