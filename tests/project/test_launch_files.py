"""launch/skypilot.yaml, the Dockerfile and launch/image.sh: files that other programs read."""

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def test_skypilot_parses_the_task() -> None:
    """Not in the extra [test]: skypilot pins click and bcrypt below what other packages here need."""
    sky_task = pytest.importorskip("sky.task", reason="skypilot is not installed")
    task = sky_task.Task.from_yaml(str(REPO / "launch" / "skypilot.yaml"))
    (resources,) = task.resources
    assert resources.use_spot
    assert resources.accelerators == {"H100": 8}
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
    assert task.num_nodes == 1


def test_the_image_and_the_script_without_docker_have_the_same_steps() -> None:
    """Every command of the Dockerfile is a step of launch/image_steps.sh, which the script runs, too."""
    step_of = re.compile(r"image_steps\.sh\"? (\w+)")
    dockerfile = (REPO / "Dockerfile").read_text()
    commands = re.findall(r"^RUN (.+)$", dockerfile, re.MULTILINE)
    assert len(commands) == 4
    assert all(step_of.search(command) for command in commands)
    steps = {step for command in commands for step in step_of.findall(command)}
    assert steps == {"system", "install", "check"}
    assert set(step_of.findall((REPO / "launch" / "image.sh").read_text())) == steps - {"system"}
    assert set(step_of.findall((REPO / "launch" / "skypilot.yaml").read_text())) == {"install"}
    for name in ("image.sh", "image_steps.sh"):
        subprocess.run(["bash", "-n", REPO / "launch" / name], check=True)


def test_what_is_copied_into_the_image_is_enough_for_a_wheel() -> None:
    """.dockerignore leaves out all that it does not name. A wheel needs the files of pyproject.toml."""
    kept = {line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"configs", "launch", "olmoe_train", "pyproject.toml", "README.md", "LICENSE"} <= kept
    assert "constraints.txt" in kept
