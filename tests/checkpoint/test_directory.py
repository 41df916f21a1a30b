"""Checkpoint directories: what counts as complete, what damage is seen, what is kept. Real files
throughout.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olmoe_train.checkpoint import sharded as training
from olmoe_train.checkpoint.directory import (
    CheckpointError,
    checkpoint_path,
    complete_checkpoints,
    delete,
    is_complete,
    latest_checkpoint,
    superseded,
    verify,
)
from olmoe_train.checkpoint.sharded import open_model_tensors, save_checkpoint
from olmoe_train.utils.errors import UserError
from tests.support.ranks import RankError, run_ranks
from tests.support.tiny import build, train_step, whole

pytestmark = pytest.mark.ranks  # a fixture starts two
SHARD_1 = "shard-00001-model-00001-of-00001.safetensors"
SHARD_2 = "shard-00002-model-00001-of-00001.safetensors"
ALL_FILES = {SHARD_1, SHARD_2, "state.json", "manifest.json"}


def save_one(run_dir: Path) -> dict[str, Tensor]:
    model, optimizer = build()
    train_step(model, optimizer, 0)
    save_checkpoint(run_dir, 7, model, optimizer, {"step": 7})
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint that two ranks wrote, and the parameters that are in it."""
    run_dir = tmp_path_factory.mktemp("run")
    return checkpoint_path(run_dir, 7), run_ranks(2, save_one, run_dir)[0]


@pytest.fixture
def checkpoint(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    directory = checkpoint_path(tmp_path, 7)
    shutil.copytree(saved[0], directory)
    return directory


def test_it_is_safetensors_and_json_and_no_pickle(checkpoint: Path) -> None:
    assert {path.name for path in checkpoint.iterdir()} == ALL_FILES
    assert json.loads((checkpoint / "state.json").read_text())["state"] == {"step": 7}
    assert is_complete(checkpoint)
    verify(checkpoint)


def test_parameters_read_back_whole_from_the_ranks_files(
    checkpoint: Path, saved: tuple[Path, dict[str, Tensor]]
) -> None:
    read = open_model_tensors(checkpoint)
    for name, expected in saved[1].items():
        assert torch.equal(read(name), expected), name
    with pytest.raises(KeyError):
        read("model.layers.99.mlp.gate.weight")


@pytest.mark.parametrize("name", [SHARD_1, SHARD_2, "state.json"])
def test_one_flipped_bit_is_found_and_named(checkpoint: Path, name: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-5] ^= 1
    (checkpoint / name).write_bytes(content)
    assert is_complete(checkpoint)  # sizes do not tell
    with pytest.raises(CheckpointError, match=f"{checkpoint}: {name} is damaged"):
        open_model_tensors(checkpoint)


def test_a_truncated_or_missing_file_makes_it_incomplete(checkpoint: Path) -> None:
    os.truncate(checkpoint / SHARD_2, (checkpoint / SHARD_2).stat().st_size - 1)
    assert not is_complete(checkpoint)
    with pytest.raises(CheckpointError, match=f"{SHARD_2} is damaged"):
        verify(checkpoint)
    (checkpoint / SHARD_2).unlink()
    assert not is_complete(checkpoint)
    with pytest.raises(CheckpointError, match=f"{SHARD_2} cannot be read"):
        verify(checkpoint)


def test_a_torn_manifest_makes_it_incomplete(checkpoint: Path) -> None:
    text = (checkpoint / "manifest.json").read_text()
    for torn in (text[:-40], "[]", '{"files": {"state.json": {}}}', ""):
        (checkpoint / "manifest.json").write_text(torn)
        assert not is_complete(checkpoint)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            verify(checkpoint)
    (checkpoint / "manifest.json").unlink()
    assert not is_complete(checkpoint)


def test_a_file_from_elsewhere_is_refused(checkpoint: Path) -> None:
    shutil.copy(checkpoint / SHARD_2, checkpoint / "shard-00003-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"shard-00003.* is not part of this checkpoint"):
        verify(checkpoint)


def test_a_manifest_may_not_point_outside(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["../state.json"] = manifest["files"]["state.json"]
    shutil.copy(checkpoint / "state.json", checkpoint.parent)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert not is_complete(checkpoint)
    with pytest.raises(CheckpointError, match="files outside"):
        verify(checkpoint)


def test_steps_decide_the_order_and_not_the_clock(checkpoint: Path) -> None:
    run_dir = checkpoint.parent.parent
    for step in (40, 100_000_000, 9):
        shutil.copytree(checkpoint, checkpoint_path(run_dir, step))
    os.utime(checkpoint_path(run_dir, 9), (2**32, 2**32))
    (checkpoint_path(run_dir, 40) / "manifest.json").unlink()  # incomplete: not a checkpoint
    shutil.copytree(checkpoint, run_dir / "checkpoints" / ".step-00000050.partial")
    shutil.copytree(checkpoint, run_dir / "checkpoints" / "step-00000060.bad")
    steps = [int(path.name.removeprefix("step-")) for path in complete_checkpoints(run_dir)]
    assert steps == [100_000_000, 9, 7]
    assert latest_checkpoint(run_dir) == checkpoint_path(run_dir, 100_000_000)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None


def test_retention_keeps_the_newest_complete_ones_and_every_nth(checkpoint: Path) -> None:
    run_dir = checkpoint.parent.parent
    for step in (8, 10, 12, 11):
        shutil.copytree(checkpoint, checkpoint_path(run_dir, step))
    (checkpoint_path(run_dir, 12) / SHARD_1).unlink()  # damaged: counts for nothing, and is left

    def given_up(keep: int, keep_every: int = 0) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in superseded(run_dir, keep, keep_every)]

    assert given_up(0) == given_up(0, 2) == []
    assert given_up(2) == [8, 7]
    assert given_up(1, keep_every=4) == [10, 7]
    delete(superseded(run_dir, 2))
    left = sorted(path.name for path in checkpoint.parent.iterdir())
    assert left == ["step-00000010", "step-00000011", "step-00000012"]


def test_nothing_is_ever_overwritten(checkpoint: Path) -> None:
    before = (checkpoint / SHARD_1).read_bytes()
    with pytest.raises(RankError, match="exists already and is not overwritten"):
        run_ranks(1, save_one, checkpoint.parent.parent)
    assert {path.name for path in checkpoint.iterdir()} == ALL_FILES
    assert (checkpoint / SHARD_1).read_bytes() == before


def test_left_overs_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    left_over = tmp_path / "checkpoints" / ".step-00000005.partial"
    left_over.mkdir(parents=True)
    (left_over / SHARD_1).write_bytes(b"half")
    run_ranks(1, save_one, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000007"]


def save_with_a_full_disk_on_rank_1(run_dir: Path) -> str:
    model, optimizer = build()
    train_step(model, optimizer, 0)
    if torch.distributed.get_rank() == 1:

        def full(path: Path) -> dict[str, Any]:
            raise OSError(28, "No space left on device")

        training.entry_of = full
    with pytest.raises(RuntimeError, match=r"rank 1 \(host .+\): OSError: .*No space left on device"):
        save_checkpoint(run_dir, 7, model, optimizer, {})
    return "raised"


def test_a_rank_that_cannot_write_fails_the_save_everywhere(tmp_path: Path) -> None:
    assert run_ranks(2, save_with_a_full_disk_on_rank_1, tmp_path) == ["raised", "raised"]
    assert latest_checkpoint(tmp_path) is None


def test_errors_of_checkpoints_are_the_users_to_see() -> None:
    assert issubclass(CheckpointError, UserError)
