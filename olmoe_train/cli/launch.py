"""`olmoe launch slurm|k8s`: a training as a SLURM job or as Kubernetes objects.

    olmoe launch slurm nodes=4 gpus_per_node=8 time=12:00:00 experiment=... data.dir=DIR run_dir=RUN --submit
    olmoe launch k8s kind=jobset nodes=4 image=IMAGE volumes={runs:/runs} experiment=... run_dir=/runs/a

Keys of the launcher and keys of `olmoe train` stand side by side. The latter are checked here, and passed to
the training as they were given.
"""

import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmoe_train.cli.app import run_verb
from olmoe_train.config import compose
from olmoe_train.config.launch import KubernetesConfig, LaunchConfig, SlurmConfig, launcher_keys
from olmoe_train.utils.errors import UserError, configuration_error
from olmoe_train.utils.exit_codes import BAD_INPUT, OK

if TYPE_CHECKING:
    from olmoe_train.cli.multirun import SweptRun

SCHEMAS: dict[str, type[LaunchConfig]] = {"slurm": SlurmConfig, "k8s": KubernetesConfig}
USAGE = """usage: olmoe launch slurm [key=value ...] [--print|--submit] [--multirun]
       olmoe launch k8s [key=value ...]

  slurm   a batch script, printed or submitted
  k8s     YAML of a TrainJob, a JobSet or a PyTorchJob, printed for kubectl

Keys are those of the launcher and those of `olmoe train`. `olmoe launch slurm --help` lists them."""
DESCRIPTIONS = {
    "slurm": "Render a training as a batch script of SLURM.\n--print (default): print the script. --submit: "
    "run sbatch with it.\n--multirun: an array job, one task per combination of values, given as key=a,b or "
    "key=range(3).",
    "k8s": "Render a training as YAML for Kubernetes, to be piped into `kubectl apply -f -`.",
}
PRINT, SUBMIT = "--print", "--submit"


@dataclass(frozen=True)
class CommandLine:
    launcher: list[str] = field(default_factory=list)
    """Overrides of the launcher's keys."""
    train: list[str] = field(default_factory=list)
    """Overrides of `olmoe train`, as they were given."""
    config_directory: list[str] = field(default_factory=list)
    """--config-dir=DIR, if it was given."""
    shown: list[str] = field(default_factory=list)
    """Flags of run_verb, such as --help and --cfg job, with their values."""
    submit: bool = False
    multirun: bool = False


@dataclass(frozen=True)
class Sweep:
    """What --multirun asks for."""

    directory: Path
    runs: list["SweptRun"]
    configurations: list[Any]
    """Those of `olmoe train` of the runs; none with --config-dir, whose presets `compose` does not know."""

    def trainings(self, flags: list[str]) -> list[list[str]]:
        """The arguments of each training."""
        return [[*flags, *run.overrides, f"run_dir={self.directory / run.name}"] for run in self.runs]


def run() -> int:
    """Run `olmoe launch` with the command line; returns the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return OK if words else BAD_INPUT
    name, *words = words
    if name not in SCHEMAS:
        print(f"error: no launcher {name!r}; give one of {', '.join(SCHEMAS)} first", file=sys.stderr)
        return BAD_INPUT
    try:
        line = read_command_line(name, words)
        sweep = _sweep(line) if line.multirun else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    # run_verb composes the launcher's keys with those of the training, or of the first one of a sweep.
    first = sweep.trainings([])[0] if sweep else line.train
    composed = [*line.launcher, *first, *_models_left_out(line)]
    sys.argv[1:] = [*line.shown, *line.config_directory, *composed]
    launch = partial(main, line=line, sweep=sweep)
    return run_verb(f"launch_{name}", SCHEMAS[name], launch, DESCRIPTIONS[name])


def main(cfg: LaunchConfig, line: CommandLine, sweep: Sweep | None) -> None:
    """Check the training, or those of the sweep, then print or submit.

    Raises:
        UserError: The configuration is wrong, or sbatch refuses the job.
    """
    from olmoe_train.cli.launch_k8s import k8s_errors, k8s_yaml
    from olmoe_train.cli.launch_slurm import slurm_errors, slurm_script, submit
    from olmoe_train.cli.multirun import record

    errors = _launcher_errors(cfg)
    errors += slurm_errors(cfg) if isinstance(cfg, SlurmConfig) else []
    errors += k8s_errors(cfg) if isinstance(cfg, KubernetesConfig) else []
    if cfg.check and cfg.nodes > 0:
        errors += _training_errors(cfg, sweep)
    if errors:
        raise configuration_error(errors)
    if isinstance(cfg, KubernetesConfig):
        print(k8s_yaml(cfg, line.config_directory + line.train), end="")
        return
    assert isinstance(cfg, SlurmConfig)
    trainings = sweep.trainings(line.config_directory) if sweep else [line.config_directory + line.train]
    script = slurm_script(cfg, trainings, is_array=sweep is not None)
    if not line.submit:
        print(script, end="")
        return
    job = submit(script)
    if sweep:
        record(sweep.directory, sweep.runs)
    print(f"submitted job {job}")


def read_command_line(name: str, words: list[str]) -> CommandLine:
    """Divide the command line between the launcher and the training.

    Args:
        name: slurm or k8s.
        words: What follows it.

    Raises:
        UserError: A flag is not one of `olmoe launch`.
    """
    from olmoe_train.cli.multirun import FLAGS as MULTIRUN
    from olmoe_train.cli.ranks import SHOW_ONLY

    keys = launcher_keys(SCHEMAS[name])
    line = CommandLine()
    words = list(words)
    while words:
        word = words.pop(0)
        flag, _, value = word.partition("=")
        if flag in (PRINT, SUBMIT) or word in MULTIRUN:
            if name != "slurm" and word != PRINT:
                raise UserError(
                    f"{word}: `olmoe launch {name}` prints one training; pipe it into `kubectl apply -f -`, "
                    "and give each combination of values its own command and name"
                )
            line = replace(
                line, submit=line.submit or word == SUBMIT, multirun=line.multirun or word in MULTIRUN
            )
        elif flag in ("--config-dir", "-cd"):
            directory = value or (words.pop(0) if words else "")
            # The image of a pod has its own directories.
            directory = directory if name == "k8s" else str(Path(directory).absolute())
            line.config_directory.append(f"--config-dir={directory}")
        elif flag in SHOW_ONLY:
            line.shown.extend([word, words.pop(0)] if word in ("--cfg", "-c") and words else [word])
        elif word.startswith("-"):
            raise UserError(
                f"{word}: no flag of `olmoe launch {name}`; nodes and gpus_per_node set the number of ranks, "
                "and --help lists keys and flags"
            )
        else:
            key = flag.lstrip("+~").split(".")[0]
            (line.launcher if key in keys else line.train).append(word)
    return line


def _sweep(line: CommandLine) -> Sweep:
    from olmoe_train.cli.multirun import plan_runs

    without = _models_left_out(line)
    _, runs, directory = plan_runs(["--multirun", *line.config_directory, *line.train, *without])
    composed = [] if line.config_directory else [compose(*run.overrides) for run in runs]
    as_given = [replace(run, overrides=[w for w in run.overrides if w not in without]) for run in runs]
    return Sweep(directory, as_given, composed)


def _models_left_out(line: CommandLine) -> tuple[str, ...]:
    """Overrides for composing alone: with check=false no model is read."""
    return ("model.init_from=null", "model.adapter_from=null") if "check=false" in line.launcher else ()


def _launcher_errors(cfg: LaunchConfig) -> list[str]:
    return [
        f"{key}={value}: must be at least {least}"
        for key, value, least in (
            ("nodes", cfg.nodes, 1),
            ("gpus_per_node", cfg.gpus_per_node, 0),
            ("save_seconds", cfg.save_seconds, 1),
        )
        if value < least
    ]


def _training_errors(cfg: LaunchConfig, sweep: Sweep | None) -> list[str]:
    """What is wrong with the training, or with those of a sweep, on that many ranks."""
    from olmoe_train.training.preflight.checks import configuration_errors

    if sweep is None or not sweep.configurations:
        return configuration_errors(cfg, cfg.ranks)
    return [
        f"{run.name}: {error}"
        for run, one in zip(sweep.runs, sweep.configurations, strict=True)
        for error in configuration_errors(one, cfg.ranks)
    ]


if __name__ == "__main__":
    sys.exit(run())
