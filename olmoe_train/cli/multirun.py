"""`olmoe train --multirun`: one training per combination of values, one after the other, and a table of all.

    olmoe train --multirun optimizer=adamw,muon seed=range(3) experiment=quickstart data.dir=DIR run_dir=SWEEP

Hydra's grammar says which overrides have several values: `key=a,b`, `key=choice(a,b)`, `key=range(3)`. Each
training is a process of its own, so that it starts as it would alone. Its run directory is
SWEEP/optimizer-muon_seed-1, and SWEEP/sweep.json keeps its values. Running the command again continues: what
is done is not repeated. A second command with other values and the same SWEEP adds rows to the table.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import OverrideParseException

from olmoe_train.cli.ranks import FLAGS as RANKS_FLAGS
from olmoe_train.cli.ranks import only_shows
from olmoe_train.cli.run_status import run_directory
from olmoe_train.config import compose
from olmoe_train.reporting.run_data import read_object
from olmoe_train.reporting.sweep import RUNS, TABLE, sweep_table
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT, OK, STOPPED_BY_SIGNAL
from olmoe_train.utils.files import atomic_write_text

FLAGS = ("--multirun", "-m")
HELP = (
    f"{' or '.join(FLAGS)}: one training per combination of values, given as key=a,b or key=range(3). "
    "run_dir is\nthe directory of the runs, and of the table that compares them."
)
CONFIG_FLAGS = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")
"""Flags of Hydra that change where presets are read from. They have a value."""


@dataclass(frozen=True)
class SweptRun:
    values: dict[str, str]
    """The keys that have several values in the sweep, and their values in this run."""
    overrides: list[str]
    """All overrides of this run, without run_dir."""

    @property
    def name(self) -> str:
        """The name of the run's directory. Hydra's grammar needs no quotes for it, as it does for `=`."""
        pairs = "_".join(f"{key}-{value}" for key, value in self.values.items())
        return re.sub(r"[^\w.-]", "_", pairs)


def is_multirun(arguments: list[str]) -> bool:
    """Whether the command line asks for several trainings."""
    return any(argument in FLAGS for argument in arguments) and not only_shows(arguments)


def multirun(arguments: list[str]) -> int:
    """Train every combination, then print the table and write it.

    Args:
        arguments: The command line of `olmoe train`.

    Returns:
        The exit code: 0 if every run is done; 2 if the command line is wrong, before any run starts; that of
        the run that a signal stopped; else that of the first run that failed. A failed run does not stop the
        others.
    """
    try:
        flags, runs, directory = plan_runs(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    print(f"{len(runs)} runs in {directory}: {', '.join(runs[0].values)} vary", flush=True)
    codes = []
    for number, run in enumerate(runs, 1):
        already_done = is_done(directory, run)
        print(f"run {number} of {len(runs)}: {run.name}{' is done' * already_done}", flush=True)
        code = OK if already_done else _train(flags, run, directory)
        codes.append(code)
        if code != OK:
            print(f"run {number} of {len(runs)} ended with exit code {code}: {run.name}", file=sys.stderr)
        if code == STOPPED_BY_SIGNAL or code >= 128 or code < 0:
            break
    table = sweep_table(directory)
    atomic_write_text(directory / TABLE, table + "\n")
    print(f"\n{table}\n\nthis table is {directory / TABLE}")
    return next((code for code in codes if code != OK), OK)


def plan_runs(arguments: list[str]) -> tuple[list[str], list[SweptRun], Path]:
    """What the command line asks for: (flags of every run, runs, directory of the sweep).

    Raises:
        UserError: No key has several values, or a combination is no configuration.
    """
    if "RANK" in os.environ:
        raise UserError(
            f"{FLAGS[0]}: this process is a rank of torchrun; start the sweep with `olmoe train "
            f"{FLAGS[0]} {RANKS_FLAGS[0]} RANKS`"
        )
    words = [word for word in arguments if word not in FLAGS]
    flags, given = _flags_and_overrides(words)
    choices: list[list[tuple[str | None, str]]] = []  # per override: (swept value or None, override)
    for override in map(_parse, given):
        if not override.is_sweep_override():
            choices.append([(None, str(override.input_line))])
            continue
        key = override.get_key_element()
        if key in ("run_dir", "checkpoint.resume", "checkpoint.branch_from") or isinstance(
            override.value(), Glob
        ):
            raise UserError(
                f"{override.input_line}: cannot vary in a sweep; give {key} one value, or start the runs "
                "one by one"
            )
        choices.append([(value, f"{key}={value}") for value in override.sweep_string_iterator()])
    runs = [_run_of(combination) for combination in itertools.product(*choices)]
    if not runs[0].values:
        raise UserError(f"{FLAGS[0]}: no key has several values; give one, such as seed=0,1,2")
    directory = run_directory([choice[0][1] for choice in choices if choice[0][0] is None])
    if (directory / "metrics.jsonl").is_file():
        raise UserError(
            f"run_dir={directory} is the directory of a single run; set run_dir to a directory for the sweep"
        )
    if not any(flag.split("=")[0] in CONFIG_FLAGS for flag in flags):
        for run in runs:
            _check(run)
    return flags, runs, directory


def _parse(word: str) -> Override:
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except OverrideParseException as error:
        raise UserError(f"{word}: no override in Hydra's grammar: {str(error).splitlines()[0]}") from None


def _flags_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Separate flags, with their values, from overrides."""
    flags, overrides = [], []
    takes_value = (*RANKS_FLAGS, *CONFIG_FLAGS)
    words = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            flags += [word, words.pop(0)] if word in takes_value and words else [word]
        else:
            overrides.append(word)
    return flags, overrides


def _run_of(combination: tuple[tuple[str | None, str], ...]) -> SweptRun:
    overrides = [override for _, override in combination]
    swept = {
        override.partition("=")[0].lstrip("+"): value for value, override in combination if value is not None
    }
    return SweptRun(swept, [word for word in overrides if not word.startswith("run_dir=")])


def _check(run: SweptRun) -> None:
    """Compose the configuration of a run before any run starts.

    Raises:
        UserError: It is wrong; the message names the run.
    """
    try:
        compose(*run.overrides)
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None


def is_done(directory: Path, run: SweptRun) -> bool:
    """Whether an earlier command has completed this run, with the same overrides."""
    before = read_object(directory / RUNS).get(run.name, {})
    is_same = before.get("overrides") == run.overrides
    return is_same and read_object(directory / run.name / "status.json").get("state") == "done"


def record(directory: Path, runs: list[SweptRun]) -> None:
    """Add runs to those of the sweep, for its table."""
    directory.mkdir(parents=True, exist_ok=True)
    new = {run.name: {"values": run.values, "overrides": run.overrides} for run in runs}
    known = read_object(directory / RUNS) | new
    atomic_write_text(directory / RUNS, json.dumps(known, indent=1) + "\n")


def _train(flags: list[str], run: SweptRun, directory: Path) -> int:
    """Train one run in a process of its own, and return its exit code."""
    record(directory, [run])
    command = [sys.executable, "-m", "olmoe_train", "train", *flags, *run.overrides]
    with subprocess.Popen([*command, f"run_dir={directory / run.name}"]) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the terminal sent Ctrl-C to the run, too, which now saves
