"""`olmoe train --multirun`: which runs a command line means, and the table of their values."""

import json
from pathlib import Path

import pytest

from olmoe_train.cli.multirun import plan_runs
from olmoe_train.reporting.sweep import sweep_table
from olmoe_train.utils.errors import UserError


def test_the_runs_are_every_combination(tmp_path: Path) -> None:
    flags, runs, directory = plan_runs(
        [
            *("-m", "--nproc", "2", f"run_dir={tmp_path}", "data.dir=unused"),
            *("optimizer=adamw,muon", "seed=range(2)", "optimizer.no_decay=[norm,head]"),
        ]
    )
    assert flags == ["--nproc", "2"]
    assert directory == tmp_path
    assert [run.name for run in runs] == [
        "optimizer-adamw_seed-0",
        "optimizer-adamw_seed-1",
        "optimizer-muon_seed-0",
        "optimizer-muon_seed-1",
    ]
    # A list is one value, and the directory of the sweep is not that of a run.
    assert runs[2].overrides == [
        *("data.dir=unused", "optimizer=muon", "seed=0", "optimizer.no_decay=[norm,head]")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=0"], "--multirun: no key has several values"),
        (["seed=0,1,"], "seed=0,1,: no override in Hydra's grammar"),
        (["run_dir=a,b"], "run_dir=a,b: cannot vary in a sweep"),
        (["optimizer=glob(*)"], "optimizer=glob(*): cannot vary in a sweep"),
        (["optimizer.lr=0.1,x"], "optimizer.lr-x: Error merging override optimizer.lr=x"),
        (["seed=0,1", "nosuch=1"], "Could not override 'nosuch'"),
    ],
)
def test_a_wrong_command_line_starts_nothing(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan_runs(["--multirun", "data.dir=unused", *words])
    assert message in str(error.value)


def test_the_directory_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="is the directory of a single run"):
        plan_runs(["-m", "data.dir=unused", "seed=0,1", f"run_dir={tmp_path}"])


def write_run(sweep: Path, values: dict[str, str], loss: float, violation: float, state: str) -> None:
    """A run of four logged steps of 100 tokens. The step takes 0.5 s, but the first one takes 2 s."""
    name = "_".join(f"{key}-{value}" for key, value in values.items())
    runs = sweep / "sweep.json"
    known = json.loads(runs.read_text()) if runs.is_file() else {}
    runs.write_text(json.dumps(known | {name: {"values": values, "overrides": []}}))
    (sweep / name).mkdir()
    (sweep / name / "status.json").write_text(json.dumps({"state": state}))
    records = [
        {
            "step": step,
            "tokens": 100 * step,
            "perf/tokens_per_second": 50 if step == 1 else 200,
            "router/max_violation": violation if step == 4 else 9.0,
        }
        for step in range(1, 5)
    ]
    records += [{"step": 4, "tokens": 400, "eval/validation/loss": loss}]
    (sweep / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_table_has_the_mean_over_seeds(tmp_path: Path) -> None:
    """The standard deviation of 2 and 4 is sqrt(2), and that of 0.1 and 0.3 is 0.2 / sqrt(2)."""
    write_run(tmp_path, {"optimizer": "adamw", "seed": "0"}, loss=2.0, violation=0.1, state="done")
    write_run(tmp_path, {"optimizer": "adamw", "seed": "1"}, loss=4.0, violation=0.3, state="done")
    write_run(tmp_path, {"optimizer": "muon", "seed": "0"}, loss=2.5, violation=0.5, state="done")
    write_run(tmp_path, {"optimizer": "muon", "seed": "1"}, loss=1.0, violation=0.5, state="stopped")
    assert sweep_table(tmp_path).splitlines() == [
        "| optimizer | runs | validation loss | max violation | seconds per step |",
        "| :-- | --: | --: | --: | --: |",
        "| muon | 1 | 2.5000 | 0.5000 | 0.5000 |",
        "| adamw | 2 | 3.0000 ± 1.4142 | 0.2000 ± 0.1414 | 0.5000 ± 0.0000 |",
        "",
        "Not done: optimizer-muon_seed-1",
    ]
