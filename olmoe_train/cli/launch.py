"""Run torchrun, but exit with the exit code of the workers.

torchrun itself exits with 1, whatever its workers exit with. That hides two codes of `olmoe train` which
schedulers need: 2 (bad configuration: do not retry) and 75 (stopped by a signal after saving: run again). The
arguments are those of torchrun:

    python -m olmoe_train.cli.launch --standalone --nproc-per-node 2 -m olmoe_train.train run_dir=RUN ...
"""

import json
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from olmoe_train.utils.exit_codes import STOPPED_BY_SIGNAL

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun passes on to the workers, which then save. SLURM is often configured to send SIGUSR1,
which would kill torchrun if it were not in this list."""


def main(arguments: list[str]) -> int:
    """Run torchrun.

    Args:
        arguments: torchrun's arguments, the name of the program left out.

    Returns:
        The exit code: 0 if all workers succeeded; that of the first worker that failed; 128 + N if signal N
        ended it; 75 if a signal stopped the run after it saved.
    """
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", SIGNALS)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A worker that a signal killed has the negative number of the signal; shells report 128 + number.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        # torchrun passed the signal on and waited for the workers, but does not report how they ended. The
        # run directory records it.
        return STOPPED_BY_SIGNAL if stopped_and_saved(arguments) else 128 + error.sigval
    return 0


def stopped_and_saved(arguments: list[str]) -> bool:
    """Whether the status.json of the run directory says that a signal stopped the run after it saved.

    Args:
        arguments: torchrun's arguments, among which the last run_dir=DIR names the run directory.
    """
    run_dirs = [a.removeprefix("run_dir=") for a in arguments if a.startswith("run_dir=")]
    status = Path(run_dirs[-1]) / "status.json" if run_dirs else None
    if status is None or not status.is_file():
        return False
    return bool(json.loads(status.read_text())["state"] == "stopped")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
