"""The batch script of `olmoe launch slurm`: its own options, and the body of launch/slurm.sbatch."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from olmoe_train import __version__
from olmoe_train.config.launch import SlurmConfig
from olmoe_train.utils.errors import UserError


def launch_directory() -> Path:
    """launch/: next to the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "launch"
    return inside if inside.is_dir() else package.parent / "launch"


def slurm_errors(cfg: SlurmConfig) -> list[str]:
    """What is wrong with the launcher's own keys: one message per error."""
    errors = []
    if cfg.array_limit is not None and cfg.array_limit < 1:
        errors.append(f"array_limit={cfg.array_limit}: must be at least 1; null: no limit")
    for key in ("job_name", "partition", "account", "qos", "time", "output"):
        value = getattr(cfg, key)
        if value is not None and (not value or value != "".join(value.split())):
            errors.append(f"{key}={value!r}: must be one word, because it becomes an option of sbatch")
    errors += [
        f"sbatch={line!r}: must be an option of sbatch, one a line, such as --constraint=h100"
        for line in cfg.sbatch
        if not line.startswith("-") or "\n" in line
    ]
    return errors


def slurm_script(cfg: SlurmConfig, trainings: list[list[str]], is_array: bool) -> str:
    """The batch script.

    Args:
        cfg: The launcher's keys.
        trainings: Arguments of each training; of one, unless the job is an array.
        is_array: Whether each training is a task of an array job.
    """
    launch = launch_directory()
    lines = [
        "#!/usr/bin/env bash",
        f"# Rendered by `olmoe launch slurm` of olmoe-train {__version__}, for sbatch. Relative paths are",
        "# relative to the directory of submission.",
        *(f"#SBATCH {option}" for option in _options(cfg, len(trainings) if is_array else 0)),
        f"export OLMOE_LAUNCH={shlex.quote(str(launch))}",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        f"export PET_SHUTDOWN_TIMEOUT={cfg.save_seconds}",
        *cfg.setup,
        *(_arguments_of_tasks(trainings) if is_array else [f"set -- {shlex.join(trainings[0])}"]),
        "",
        "# From here on this is launch/slurm.sbatch.",
    ]
    return "\n".join(lines) + "\n" + _body(launch / "slurm.sbatch")


def submit(script: str) -> str:
    """Give the script to sbatch, in this directory; returns the number of the job.

    Raises:
        UserError: There is no sbatch, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--submit: there is no sbatch on this machine; run the command on a login node of the cluster, "
            "where olmoe-train must be installed, too"
        )
    result = subprocess.run(
        ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise UserError(f"sbatch refused the job: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]


def _options(cfg: SlurmConfig, tasks: int) -> list[str]:
    """Options of sbatch. tasks: of an array job; 0: no array.

    Those that the body of launch/slurm.sbatch relies on have the values of that file.
    """
    output = cfg.output or ("olmoe-%A_%a.log" if tasks else "olmoe-%j.log")
    limit = f"%{cfg.array_limit}" if cfg.array_limit else ""
    named = {"partition": cfg.partition, "account": cfg.account, "qos": cfg.qos, "time": cfg.time}
    return [
        f"--job-name={cfg.job_name}",
        f"--nodes={cfg.nodes}",
        *([f"--gpus-per-node={cfg.gpus_per_node}"] if cfg.gpus_per_node else []),
        *(f"--{option}={value}" for option, value in named.items() if value),
        *([f"--array=0-{tasks - 1}{limit}"] if tasks else []),
        f"--output={output}",
        f"--signal=TERM@{cfg.grace_seconds}",
        *(option for option in _standing_options() if option.split("=")[0] not in OWN),
        *cfg.sbatch,
    ]


OWN = ("--job-name", "--output", "--signal")
"""Options that launch/slurm.sbatch has and that keys of the launcher set."""


def _standing_options() -> list[str]:
    lines = (launch_directory() / "slurm.sbatch").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


def _body(path: Path) -> str:
    """What launch/slurm.sbatch does, after its options."""
    _, separator, body = path.read_text(encoding="utf-8").partition("\nset -euo pipefail\n")
    assert separator, path
    return separator.lstrip() + body


def _arguments_of_tasks(trainings: list[list[str]]) -> list[str]:
    """Bash that sets the arguments of this task of the array job."""
    return [
        "case $SLURM_ARRAY_TASK_ID in",
        *(f"    {number}) set -- {shlex.join(words)} ;;" for number, words in enumerate(trainings)),
        "esac",
    ]
