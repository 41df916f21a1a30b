"""torchrun that ends with its workers' own exit code, and without a traceback of its own.

torchrun exits 1 whatever its workers exit with, which hides 2 (bad configuration: do not retry) and 75
(stopped by a signal after saving: run again). Arguments are torchrun's:

    python launch/torchrun.py --standalone --nproc-per-node 2 -m olmoe_train.train run_dir=RUN ...
"""

import json
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from olmoe_train.utils.exit_codes import STOPPED_BY_SIGNAL

# Passed on to the workers, which save. SIGUSR1 is what SLURM is often told to send; torchrun would die of it.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(arguments: list[str]) -> int:
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", SIGNALS)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A worker killed by a signal has minus its number; shells say 128 plus it.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        # torchrun passed the signal on and waited, but forgot how its workers ended: the run directory knows.
        return STOPPED_BY_SIGNAL if stopped_and_saved(arguments) else 128 + error.sigval
    return 0


def stopped_and_saved(arguments: list[str]) -> bool:
    """Whether the run directory named among the overrides says so."""
    run_dirs = [a.removeprefix("run_dir=") for a in arguments if a.startswith("run_dir=")]
    status = Path(run_dirs[-1]) / "status.json" if run_dirs else None
    if status is None or not status.is_file():
        return False
    return bool(json.loads(status.read_text())["state"] == "stopped")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
