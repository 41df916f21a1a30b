"""Runs that upload to a store that fails: they go on, and continue elsewhere as if undisturbed."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from olmoe_train.checkpoint.convert.stored_model import open_stored_model
from olmoe_train.checkpoint.remote import complete_steps
from olmoe_train.cli.export import main as export
from olmoe_train.cli.model_sources import names_of_sources
from olmoe_train.config.initial_model import initial_directory, stored_architecture
from olmoe_train.config.train import CheckpointConfig, ParallelConfig
from olmoe_train.config.verbs import ExportConfig
from olmoe_train.train import train
from olmoe_train.training.callbacks import uploads
from olmoe_train.training.preflight.checks import validate
from olmoe_train.utils import object_store
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import join
from tests.support.faults import alerts, assert_same_end, config, metrics, same, saved_steps, saved_weights
from tests.support.s3 import BUCKET, KEY_ID, SECRET, Fault, FaultyS3

RUN = join(BUCKET, "runs", "one")
ONE_RANK: dict[str, Any] = {"parallel": ParallelConfig(), "model": {"attention_dropout": 0.3}}


def steps() -> list[int]:
    return [step for step, _ in complete_steps(RUN)]


def trained(data: Path, run_dir: Path, **changes: Any) -> int:
    step = train(config(data, run_dir, **ONE_RANK | changes)).step
    dist.destroy_process_group()
    return step


def assert_models_are_read_from_the_store(s3: FaultyS3, run_dir: Path) -> None:
    """The newest checkpoint of the run, and its export, written to the store."""
    weights, out = saved_weights(run_dir), join(BUCKET, "exports", "hf")
    stored = open_stored_model(RUN)
    assert same({name: stored.read(name) for name in weights}, weights)
    assert names_of_sources([f"{RUN}@all"]) == [f"{RUN}@4", f"{RUN}@6"]
    with pytest.raises(UserError, match="step=5: no such complete checkpoint; complete steps: 6, 4"):
        open_stored_model(RUN, "5")
    s3.faults = [Fault("500", "PUT.*exports", times=2), Fault("cut", "GET.*exports.*safetensors", times=2)]
    export(ExportConfig(source=RUN, out=out))
    assert [line for line in s3.requests if "PUT /bucket/exports" in line][-1].endswith("config.json")
    exported = open_stored_model(out)
    assert same({name: exported.read(name) for name in weights}, weights)
    assert stored_architecture(initial_directory(out, None)).num_experts == stored.config.num_experts
    s3.requests.clear()
    open_stored_model(out)
    assert s3.count("GET.*safetensors") == 0  # it is in the cache
    object_store.write(join(out, "config.json"), b"{}")
    assert (initial_directory(out, None) / "config.json").read_bytes() == b"{}"


def test_a_run_continues_on_another_machine_from_what_was_uploaded(
    s3: FaultyS3, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin, first, second = tmp_path / "twin", tmp_path / "first", tmp_path / "second"
    uploading = CheckpointConfig(every=2, keep=2, upload_to=RUN)
    assert trained(data, twin) == 6
    s3.faults = [Fault("500", "PUT", times=3), Fault("reset", "PUT", times=2), Fault("500", "GET", times=2)]
    assert trained(data, first, checkpoint=uploading, trainer={"stop_at_step": 4}) == 4
    assert steps() == [4, 2] == sorted(saved_steps(first), reverse=True)
    assert not alerts(first)

    s3.faults = [Fault("cut", "GET.*step-00000004", times=3)]
    assert trained(data, second, checkpoint=uploading) == 6
    assert_same_end(second, twin)
    assert steps() == [6, 4] == sorted(saved_steps(second), reverse=True)
    log = (second / "log.txt").read_text() + (first / "log.txt").read_text()
    assert f"uploaded step-00000006 to {RUN}" in log
    assert KEY_ID not in log
    assert SECRET not in log
    assert not list(second.glob(f"{uploads.STAGING}/*"))

    monkeypatch.setenv("OLMOE_TRAIN_CACHE", str(tmp_path / "cache"))
    assert_models_are_read_from_the_store(s3, second)

    never = replace(uploading, resume="never")
    with pytest.raises(UserError, match=r"checkpoint.upload_to=s3://bucket/runs/one already holds step 6"):
        trained(data, tmp_path / "third", checkpoint=never)
    dist.destroy_process_group()


def test_a_store_that_refuses_or_stalls_never_stops_a_run(s3: FaultyS3, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = partial(trained, data, run_dir)
    s3.faults = [Fault("403", "PUT", times=99)]
    refused = CheckpointConfig(every=2, keep=2, upload_to=RUN)
    assert run(checkpoint=refused, trainer={"stop_at_step": 4}) == 4
    assert alerts(run_dir) == ["failed upload"]
    assert "access is refused" in (run_dir / "log.txt").read_text()
    assert steps() == []

    s3.faults = [Fault("stall", "PUT.*step-00000004", times=99)]  # the start goes on with the newest
    assert run(checkpoint=replace(refused, upload_wait=0.3)) == 6
    assert "was not finished within checkpoint.upload_wait=0.3 s" in (run_dir / "log.txt").read_text()
    assert [record["step"] for record in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    s3.faults = []
    assert run(checkpoint=refused) == 6
    assert steps()[0] == 6


def test_keys_that_cannot_work_with_a_store_are_refused(data: Path, tmp_path: Path) -> None:
    cfg = config(
        *(data, tmp_path / "run"),
        run_dir="s3://bucket/run",
        checkpoint={"upload_to": "here", "upload_wait": 900.0, "resume": "s3://bucket/run"},
        data={"dir": "s3://me:hunter22@bucket/prepared", "cache_gb": 0.0},
    )
    with pytest.raises(UserError) as error:
        validate(cfg, 2)
    text = str(error.value)
    for part in (
        "run_dir=s3://bucket/run: must be a directory of this machine",
        "checkpoint.upload_to=here: must be a URL",
        "checkpoint.upload_wait=900: must be at least 0 and less than trainer.timeout",
        "checkpoint.resume=s3://bucket/run: must be auto, never",
        "data.cache_gb=0.0: must be positive",
        "data.dir=s3://[redacted]@bucket/prepared: credentials do not belong into a URL",
    ):
        assert part in text
    assert "hunter22" not in text
    cfg = config(data, tmp_path / "run", data={"cache_gb": 3.0}, checkpoint={"upload_wait": 3.0})
    warnings = validate(cfg, 2)
    assert "data.cache_gb has no effect: all data is on this machine" in warnings
    assert "checkpoint.upload_wait has no effect: checkpoint.upload_to is null" in warnings


def test_retention_here_does_not_take_a_checkpoint_from_its_upload(
    s3: FaultyS3, data: Path, tmp_path: Path
) -> None:
    s3.faults = [Fault("stall", "PUT.*step-00000001/shard-00001")]  # meanwhile, all other steps are saved
    keep_one = CheckpointConfig(every=1, keep=1, upload_to=RUN)
    assert trained(data, tmp_path, checkpoint=keep_one) == 6
    log = (tmp_path / "log.txt").read_text()
    assert f"uploaded step-00000001 to {RUN}" in log
    assert "is not uploaded, because uploads take longer than checkpoint.every=1 steps; next is" in log
    assert steps() == [6]
    assert not alerts(tmp_path)
