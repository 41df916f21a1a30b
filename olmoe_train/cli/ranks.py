"""`olmoe train --nproc N`: the same training on N ranks of this machine, under torchrun."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT, FAILED

FLAGS = ("--nproc", "--nproc-per-node")
HELP = f"{' or '.join(FLAGS)} N: start N ranks on this machine. auto: one per GPU, or 1 without a GPU."
SHOW_ONLY = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i")
"""Flags that print something in place of training, in one process."""
ON_CPU = ("trainer.device=cpu", "device=cpu")
SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SAVE_SECONDS = 240
"""Time that ranks have to save after a signal before torchrun kills them; its own default is 30 s. As in
launch/torchrun.sh."""


def on_ranks(module: str, train: Callable[[], int]) -> int:
    """Start the ranks that the command line asks for, or train in this process.

    Args:
        module: What a rank runs; it gets the command line without --nproc.
        train: Trains in this process, which is alone or a rank of torchrun.

    Returns:
        The exit code of the training. With --nproc it is 1 too if a rank was killed, and 128 + N if signal N
        ended the run before it saved.
    """
    try:
        wanted, sys.argv[1:] = _split(sys.argv[1:])
        shows = only_shows(sys.argv[1:])
        on_cpu = any(key in sys.argv[1:] for key in ON_CPU)
        ranks = None if wanted is None or shows else _count(wanted, on_cpu)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if ranks is None:
        return train()
    # Imported here: a rank does without them.
    from olmoe_train.cli.torchrun import SIGNALS, killed_by
    from olmoe_train.cli.torchrun import main as launch
    from olmoe_train.data.prepare.encode import cores

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))
    here = ["--standalone", "--nnodes=1", f"--nproc-per-node={ranks}"]
    code = launch([*here, "-m", module, *sys.argv[1:]])
    signal_name = killed_by(code)
    return FAILED if signal_name and signal_name not in SIGNALS.split(",") else code


def end_process(code: int) -> NoReturn:
    """End this process with an exit code. A rank of torchrun skips the end of Python.

    gloo's threads outlive the process group (torch 2.13). A thread that still releases the last collective
    while Python ends aborts the process, and torchrun then reports a failure of a command that is done.

    Args:
        code: The exit code.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads the stream, or it is closed
            stream.flush()
    os._exit(code)


def only_shows(arguments: list[str]) -> bool:
    """Whether the command line asks for help or for the configuration."""
    return any(argument.split("=")[0] in SHOW_ONLY for argument in arguments)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take --nproc out of the command line: (its value or None, the other arguments).

    Raises:
        UserError: it has no value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*FLAGS, dest="nproc")
    try:
        known, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        raise UserError(f"{FLAGS[0]}: has no value; give a number of ranks, or auto") from None
    return known.nproc, others


def _count(wanted: str, on_cpu: bool) -> int:
    """The number of ranks to start.

    Args:
        wanted: The value of --nproc.
        on_cpu: Whether the ranks leave the GPUs alone.

    Raises:
        UserError: It is not a positive number or `auto`, there are fewer GPUs, or this process is a rank.
    """
    import torch  # here: every command comes to this module, and few have --nproc

    flag, gpus = f"{FLAGS[0]}={wanted}", torch.cuda.device_count()
    if present := [name for name in SET_BY_TORCHRUN if name in os.environ]:
        raise UserError(
            f"{flag}: this process is a rank already ({', '.join(present)} in the environment); leave "
            f"out {FLAGS[0]}, or unset them"
        )
    if wanted == "auto":
        return gpus or 1
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(f"{flag}: must be a number of ranks, at least 1, or auto")
    if 0 < gpus < int(wanted) and not on_cpu:
        raise UserError(
            f"{flag}: is more than the GPUs of this machine; give at most {gpus}, or set {ON_CPU[0]} "
            f"(of explain and evaluate: {ON_CPU[1]})"
        )
    return int(wanted)
