"""Run the commands as a user does: each in a separate process, from a directory outside the repository.

Commands of Python are forks of one process that has imported torch (fork_server.py). The tests of the
quickstart, of the wheel and of faults start processes as a user's shell does.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import fork_server
from tests.support.sizes import SIZES, overrides, section

REPO = Path(__file__).parents[2]

# A model and a run that take seconds. Every other value is that of the quickstart, with the vocabulary. Two
# layers, because the commands of a test make several runs.
MODEL = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"num_hidden_layers": 2}
TINY = [
    *overrides(section("model", MODEL)),
    "data.sequence_length=64",
    "trainer.max_steps=6",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.log_every=1",
    "evaluation.micro_batch_size=8",
    "evaluation.max_sequences=64",
]


def run(
    *command: str | Path, cwd: Path, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with this interpreter's scripts first on PATH and one thread per process."""
    words = [str(part) for part in command]
    if words[0] == sys.executable and words[1] != "-c":
        words[0] = fork_server.python()
    return subprocess.run(
        words,
        cwd=cwd,
        env=command_environment() | {"PYTHON_EXEC": fork_server.python()} | environment,  # of torchrun
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


def olmoe(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "olmoe_train", *arguments, cwd=cwd, stdin=stdin)


def train_command(*overrides: str, ranks: int = 2) -> list[str]:
    """Return the command that trains the tiny model under torchrun and exits with the workers' exit code."""
    launcher = [
        sys.executable,
        str(REPO / "launch" / "torchrun.py"),
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    layout = f"parallel.expert_parallel_size={ranks}"
    return [*launcher, "-m", "olmoe_train.train", "experiment=quickstart", layout, *TINY, *overrides]


def command_environment() -> dict[str, str]:
    """Return the caller's environment without the variables that change what a command does.

    PYTHONPATH selects this checkout, even if another one is installed.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "OLMOE_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return inherited | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(REPO)}
