"""Run torchrun, but exit with the exit code of the workers.

torchrun itself exits with 1, whatever its workers exit with. That hides two codes of `olmoe train` which
schedulers need: 2 (bad configuration: do not retry) and 75 (stopped by a signal after saving: run again). The
arguments are those of torchrun:

    python -m olmoe_train.cli.torchrun --standalone --nproc-per-node 2 -m olmoe_train.train run_dir=RUN ...
"""

import logging
import os
import signal
import socket
import sys
from argparse import Namespace

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.run import determine_local_world_size, parse_args, parse_min_max_nnodes
from torch.distributed.run import main as torchrun

from olmoe_train.cli.run_status import run_status
from olmoe_train.distributed.rendezvous import ELASTIC_RANKS
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT, FAILED, STOPPED_BY_SIGNAL

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun passes on to the workers, which then save. SLURM is often configured to send SIGUSR1,
which would kill torchrun if it were not in this list."""
TOLD_BY_THE_WORKERS = (BAD_INPUT, STOPPED_BY_SIGNAL)
"""Exit codes of workers that have printed what is wrong, or that they have saved."""


def main(arguments: list[str]) -> int:
    """Run torchrun.

    If the connection to the rendezvous is lost, because the torchrun that hosts it died, torchrun is started
    again, as often as --max-restarts says.

    Args:
        arguments: torchrun's arguments, the name of the program left out.

    Returns:
        The exit code: 0 if all workers succeeded; that of the first worker that failed; 128 + N if signal N
        ended it; 75 if a signal stopped the run after it saved; 1 if the nodes did not meet.
    """
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", SIGNALS)
    # Without it, nodes keep the address of a torchrun that has died (torch 2.13, distributed/rendezvous.py).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_adds_something)
    options = parse_args(arguments)
    if ranks := _elastic_ranks(options):
        os.environ[ELASTIC_RANKS] = ",".join(map(str, ranks))
        if not options.max_restarts:
            _say(f"warning: --nnodes={options.nnodes}, --max-restarts=0: the first lost node ends the run")
    for restarts_left in range(options.max_restarts, -1, -1):
        try:
            torchrun(arguments)
        except ChildFailedError as error:
            rank, failure = _first_failure(error)
            _report(rank, failure)
            # A worker that a signal killed has the negative number of the signal; shells report 128 + number.
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            # torchrun passed the signal on and waited for the workers, but does not report how they ended.
            # The run directory records it.
            return (
                STOPPED_BY_SIGNAL if stopped_and_saved(options.training_script_args) else 128 + error.sigval
            )
        except RendezvousError as error:
            what = f"host {socket.gethostname()}: {_no_rendezvous(error)}"
            _say(f"error: {what} (--rdzv-endpoint={options.rdzv_endpoint})")
            if not isinstance(error, RendezvousConnectionError) or not restarts_left:
                return FAILED
            _say(f"starting again; {restarts_left} of --max-restarts={options.max_restarts} left")
            continue
        return 0
    raise AssertionError


def killed_by(code: int) -> str | None:
    """The name of the signal in an exit code of `main` that is 128 + N; None for another code."""
    return next((number.name for number in signal.Signals if code == 128 + number), None)


def _adds_something(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's log says more than the workers have said."""
    if isinstance(record.args, tuple) and record.msg.startswith("failed (exitcode"):
        return record.args[0] not in TOLD_BY_THE_WORKERS
    return not record.msg.startswith("Sending process")


def _elastic_ranks(options: Namespace) -> list[int]:
    """The numbers of ranks that --nnodes=MIN:MAX allows; empty for one number of nodes.

    Args:
        options: Those of torchrun.
    """
    fewest, most = parse_min_max_nnodes(options.nnodes)
    if fewest >= most:
        return []
    of_node = determine_local_world_size(options.nproc_per_node)
    return [nodes * of_node for nodes in range(fewest, most + 1)]


def _first_failure(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and how. torchrun looks ten times a second, and may find several."""
    # Nothing kills a worker because another one failed. The others, which have lost it, exit with 1.
    return min(error.failures.items(), key=lambda one: (one[1].exitcode != -signal.SIGKILL, one[1].timestamp))


def _report(rank: int, failure: ProcessFailure) -> None:
    """Say which worker failed first, if the worker itself may not have said it."""
    if failure.exitcode in TOLD_BY_THE_WORKERS:
        return
    how = f"exited with {failure.exitcode}"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
    _say(
        f"error: rank {rank} (host {socket.gethostname()}, process {failure.pid}) {how}; "
        "see above, and status.json and log.txt in run_dir"
    )


def _no_rendezvous(error: RendezvousError) -> str:
    """Say why this node and the others have not met, and which option of torchrun sets how long they wait."""
    if isinstance(error, RendezvousConnectionError):
        return "no connection to the host of the rendezvous: lost, or none for --rdzv-conf=read_timeout=60 s"
    if isinstance(error, RendezvousTimeoutError):
        return "not all nodes came within --rdzv-conf=join_timeout=600 s"
    if isinstance(error, RendezvousClosedError):
        return "another node has ended; its log has the reason"
    return f"the nodes did not meet: {error}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def stopped_and_saved(overrides: list[str]) -> bool:
    """Whether the run directory says that a signal stopped the run after it saved.

    Args:
        overrides: Arguments of the training.
    """
    try:
        status = run_status(overrides)
    except UserError:
        return False
    return status.get("state") == "stopped" and status["reason"] == "signal"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
