"""The workflows of GitHub call scripts that a person can call, too."""

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).parents[2]


def workflow(name: str) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load((REPO / ".github" / "workflows" / f"{name}.yml").read_text())
    return content


def test_newest_releases_are_tested_every_week() -> None:
    newest = workflow("newest")
    (schedule,) = newest[True]["schedule"]  # YAML 1.1 reads the key `on` as true
    minute, hour, day, month, weekday = schedule["cron"].split()
    assert minute.isdecimal()
    assert hour.isdecimal()
    assert (day, month) == ("*", "*")
    assert weekday.isdecimal()
    commands = [step["run"] for step in newest["jobs"]["test"]["steps"] if "run" in step]
    assert commands == ['sudo -E env "PATH=$PATH" launch/test_newest.sh']


def test_ci_runs_as_root() -> None:
    """Without root, the tests of two hosts and of SLURM are skipped."""
    commands = [step.get("run") for step in workflow("ci")["jobs"]["test"]["steps"]]
    assert commands[-1] == 'sudo -E env "PATH=$PATH" .ci/run'


def test_both_scripts_run_the_same_checks_and_one_of_them_pins() -> None:
    pinned, newest = (REPO / "launch" / name for name in ("test.sh", "test_newest.sh"))
    for script in (pinned, newest):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)
        assert script.read_text().endswith('\nrun_checks "$@"\n')
    assert "\nensure_venv " in pinned.read_text()
    assert "--constraint" not in newest.read_text()
    assert "--upgrade-strategy eager" in newest.read_text()
