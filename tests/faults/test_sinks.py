"""A run that is resumed and then fails, as wandb, TensorBoard and trackio tell it, each by its own reader."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olmoe_train import __version__
from olmoe_train.config.choices import XAxis
from olmoe_train.config.train import AlarmsConfig, LoggingConfig, TrainConfig, WandbConfig
from olmoe_train.run.loggers import read_records
from olmoe_train.train import train
from olmoe_train.training.preflight import sinks
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import HIDDEN
from tests.distributed.test_step_details import PROMPTS, with_prompts
from tests.support.faults import at_step
from tests.support.ranks import RankError, run_ranks
from tests.support.wandb_files import OfflineRun, read_offline_run

SECRET = "hf_" + "a1" * 12
LAYERS, EXPERTS = 3, 8
WANDB = WandbConfig(
    group="ablation", job_type="pretrain", tags=["tiny", "test"], notes="Notes.", axis=XAxis.tokens
)


class DiedError(Exception):
    pass


def die() -> None:
    raise DiedError("of old age")


def start(cfg: TrainConfig, scratch: Path, dies_at: int | None) -> dict[str, Any]:
    """Train; what trackio's own API then reads."""
    os.environ["TRACKIO_DIR"] = str(scratch / "trackio")
    os.environ["TRACKIO_SERVER_URL"] = "http://127.0.0.1:9"  # nobody listens there
    sys.argv = ["olmoe", "train", f"model.init_from={SECRET}"]
    fault = at_step(0, dies_at, die) if dies_at else None
    train(cfg, callbacks=(fault,) if fault else ())
    return read_trackio()


def read_trackio() -> dict[str, Any]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("olmoe-train")
    logs = SQLiteStorage.get_logs("olmoe-train", run.name)
    return {"name": run.name, "config": run.config, "alerts": run.alerts(), "logs": logs}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(Run directory, trackio's data after the second start): steps 1 and 2, then 3 and 4, then it dies in 5.

    The alarms are set so that both router alarms hold at every step: each start would alert at its second.
    """
    root = tmp_path_factory.mktemp("told")
    cfg = with_prompts(root, every=2)
    logging = LoggingConfig(
        details_every=2,
        tensorboard=True,
        trackio=True,
        wandb=WANDB,
        alarms=AlarmsConfig(max_violation=0.0, entropy=100.0, collapse_steps=1),
    )
    cfg = replace(cfg, run_dir=str(root / "run"), logging=logging)
    cfg = replace(cfg, trainer=replace(cfg.trainer, max_steps=6, stop_at_step=2))
    run_ranks(1, start, cfg, root, None)
    (trackio,) = run_ranks(1, start, replace(cfg, trainer=replace(cfg.trainer, stop_at_step=4)), root, None)
    with pytest.raises(RankError, match="DiedError"):
        run_ranks(1, start, replace(cfg, trainer=replace(cfg.trainer, stop_at_step=None)), root, 5)
    return root / "run", trackio


@pytest.fixture(scope="module")
def pieces(told: tuple[Path, dict[str, Any]]) -> list[OfflineRun]:
    paths = sorted((told[0] / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    return [read_offline_run(path) for path in paths]


def test_wandb_knows_what_the_run_is(pieces: list[OfflineRun]) -> None:
    assert len({piece.run.run_id for piece in pieces}) == 1
    run, config = pieces[0].run, pieces[0].config
    assert (run.project, run.display_name) == ("olmoe-train", "run")
    assert (run.run_group, run.job_type, run.notes) == ("ablation", "pretrain", "Notes.")
    assert list(run.tags) == ["tiny", "test"]
    assert config["trainer"]["global_batch_size"] == 16
    facts = config["run"]
    assert facts["code"]["olmoe_train"] == __version__
    assert facts["command"] == f"olmoe train model.init_from={HIDDEN}"
    assert facts["layout"] == {"strategy": "fsdp", "ranks": 1, "replicate": 1, "shard": 1, "expert": 1}
    assert facts["data"] == {"validation": {"share": 1.0, "tokens": 125}}
    assert facts["parameters"] == {"total": 70816, "active": 43168}
    assert "stats" in pieces[0].kinds, "system metrics are off"


def test_wandb_has_axes_summaries_and_rich_values(pieces: list[OfflineRun]) -> None:
    defined = pieces[0].metrics
    assert {name for name, metric in defined.items() if not metric.step_metric} == {"step", "tokens"}
    assert {metric.step_metric for metric in defined.values()} == {"", "tokens"}
    assert defined["train/loss"].summary.min
    assert not defined["train/loss"].summary.last
    assert defined["router/dead_experts"].summary.last
    rows = pieces[0].history
    assert [row["step"] for row in rows] == [0, 1, 2]
    kinds = {name: row[name] for row in rows for name in row if name.endswith("._type")}
    rich = {
        "router/load_map._type": "image-file",
        "router/flow._type": "image-file",
        "eval/samples._type": "table-file",
        "train/loss_by_position._type": "histogram",
        "eval/validation/loss_by_position._type": "histogram",
    }
    loads = {f"router/layer_{layer:02d}/load._type": "histogram" for layer in range(LAYERS)}
    assert kinds == rich | loads
    drawn = [row["step"] for row in rows if "router/load_map._type" in row]
    assert drawn == [2], "at the rate of logging.details_every"
    assert [row["step"] for row in rows if row.get("router/layer_00/z", 0) > 0] == [1, 2]
    assert [row["step"] for row in rows if "eval/samples._type" in row] == [0, 2]


def test_each_alert_comes_once(told: tuple[Path, dict[str, Any]], pieces: list[OfflineRun]) -> None:
    run_dir, _ = told
    alerts = [alert for piece in pieces for alert in piece.alerts]
    assert [title for title, _ in alerts] == [
        "router collapse: load",
        "router collapse: entropy",
        "failed after step 4",
    ]
    assert re.fullmatch(r"rank 0 \(host .+, process \d+\): DiedError: of old age", alerts[2][1])
    assert alerts[1][1].startswith("step 2: router/entropy is only ")
    records = read_records(run_dir / "metrics.jsonl")
    recorded = [(row["step"], one["name"]) for row in records for one in row.get("alerts", [])]
    assert recorded == [(2, alerts[0][0]), (2, alerts[1][0])]
    log = (run_dir / "log.txt").read_text()
    assert log.count("WARNING: step 2: router/max_violation is ") == 1
    kept = json.loads((run_dir / "alerts.json").read_text())
    assert [one["name"] for one in kept] == [title for title, _ in alerts]


def test_tensorboard(told: tuple[Path, dict[str, Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, _ = told
    reader = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    records = [row for row in read_records(run_dir / "metrics.jsonl") if "train/loss" in row]
    read = [(event.step, event.value) for event in reader.Scalars("train/loss")]
    assert read == [(row["step"], pytest.approx(row["train/loss"])) for row in records]
    tags = reader.Tags()
    assert tags["images"] == ["router/load_map", "router/flow"]
    assert {f"router/layer_{layer:02d}/load" for layer in range(LAYERS)} == set(tags["histograms"])
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    assert texts >= {"eval/samples/0", "eval/samples/1", "alerts/router collapse: load"}
    row, _ = [row for row in records if "train/loss_by_position" in row]
    for part, loss in enumerate(row["train/loss_by_position"]):
        assert (f"train/loss_by_position/{part:02d}" in tags["scalars"]) == (loss is not None)


def test_trackio(told: tuple[Path, dict[str, Any]]) -> None:
    run_dir, trackio = told
    records = [row for row in read_records(run_dir / "metrics.jsonl") if "train/loss" in row]
    read = [(row["step"], row["train/loss"]) for row in trackio["logs"] if "train/loss" in row]
    assert read == [(row["step"], pytest.approx(row["train/loss"])) for row in records]
    assert trackio["name"] == "run"
    assert trackio["config"]["run"]["parameters"]["total"] == 70816
    assert {alert["title"] for alert in trackio["alerts"]} == {
        "router collapse: load",
        "router collapse: entropy",
    }
    rich = [row for row in trackio["logs"] if "router/load_map" in row]
    assert [row["step"] for row in rich] == [2, 4]
    assert PROMPTS[0] in json.dumps(trackio["logs"])


def no_package(name: str) -> None:
    """What find_spec returns where a package is missing."""


def refusal_without_packages(cfg: TrainConfig) -> str:
    sinks.find_spec = no_package
    with pytest.raises(UserError) as caught:
        train(cfg)
    return str(caught.value)


def test_a_sink_without_its_package_is_refused(tmp_path: Path) -> None:
    cfg = with_prompts(tmp_path)
    cfg = replace(cfg, run_dir=str(tmp_path / "run"))
    cfg = replace(cfg, logging=replace(cfg.logging, tensorboard=True, trackio=True))
    (message,) = run_ranks(1, refusal_without_packages, cfg)
    for name in ("tensorboard", "trackio"):
        assert f"logging.{name}=true: the package {name} is not installed; run: pip install" in message
