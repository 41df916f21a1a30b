"""A Python that starts at once: a fork of a process that has imported torch and the commands.

Each command of the tests, and each of its workers under torchrun, would otherwise spend three to six seconds
of CPU time on imports. `python()` returns an executable that takes python's command line (`-m MODULE`, or a
script). The fork has the executable's input, output, directory and environment, gets its signals, and dies
with it; the executable ends as the fork does.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

REPO = Path(__file__).parents[2]
COMMANDS = ("evaluate", "explain", "export", "generate", "logprobs", "plan", "prepare", "torchrun", "upcycle")
# What forks share, also those of ranks.py. Optimizers import torch._dynamo. DeepSpeed imports Inductor at its
# first step, which would take over a second of each fork.
IMPORTS = [
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor",
    "deepspeed",
    "olmoe_train.train",
]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TORCH_WARM_POOL": "0"}
"""Of a process that forks, which must have no threads: DeepSpeed reads the first when it is imported, and
Inductor the second."""


@functools.cache
def python() -> str:
    """Start the server, which lives as long as this process; return the path of the executable."""
    directory = Path(tempfile.mkdtemp(prefix="fork-server-"))
    atexit.register(shutil.rmtree, directory)
    executable, address = directory / "python", directory / "socket"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" run "{address}" "$@"\n')
    executable.chmod(0o755)
    own = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fork_server", "serve", str(address)],
        cwd=REPO,
        env=os.environ | ENVIRONMENT | own,
        stdin=subprocess.PIPE,  # its end of file ends the server
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    atexit.register(server.kill)
    return str(executable)


# --- the server -------------------------------------------------------------------------------------------


def serve(address: str) -> list[str]:
    """Fork a process per connection. Returns in that process: the command line to run."""
    for module in [*IMPORTS, *(f"olmoe_train.cli.{command}" for command in COMMANDS)]:
        import_module(module)
    gc.freeze()  # a collection need not visit what was imported
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the monitors
    os.write(1, b"ready\n")
    watched: list[Any] = [listener, 0]
    while True:
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _monitor(connection)
        connection.close()


def _monitor(connection: socket.socket) -> list[str]:
    """Fork the process of a command, tell its executable the process ID and the exit status, and end.

    Returns in the process of the command.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    command = json.loads(message)
    pid = os.fork()
    if pid == 0:
        connection.close()
        return _become(command, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    watched: list[Any] = [connection, ended]
    ready, _, _ = select.select(watched, [], [])
    if connection in ready:  # the executable was killed
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if ended in ready:
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _become(command: dict[str, list[str]], streams: Sequence[int]) -> list[str]:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(command["directory"][0])
    os.environ.clear()
    os.environ.update(dict(entry.split("=", 1) for entry in command["environment"]))
    # As Python opens them. The objects that the server's imports keep write to the same streams.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    return command["arguments"]


def run_as_python(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does."""
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):  # torch has read the server's
        torch.set_num_threads(int(threads))
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        del arguments[0]
    if arguments[0] == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = arguments[1:]
        sys.modules.pop(arguments[1], None)  # python -m executes a module that nothing has imported
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


# --- the executable ---------------------------------------------------------------------------------------


def run_in_fork(address: str, arguments: list[str]) -> int:
    """Have the server run a command in place of this process; return its exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    command = {
        "arguments": arguments,
        "directory": [os.getcwd()],  # noqa: PTH109  pathlib takes longer to import than all of this
        "environment": [f"{name}={value}" for name, value in os.environ.items()],
    }
    socket.send_fds(connection, [json.dumps(command).encode()], [0, 1, 2])
    answers = connection.makefile()
    pid = int(answers.readline())

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and its status is on the way
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    status = int(answers.readline())
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        run_as_python(serve(sys.argv[2]))
    else:
        sys.exit(run_in_fork(sys.argv[2], sys.argv[3:]))
