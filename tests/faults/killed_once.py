"""For torchrun: `killed_once.py DATA RUN_DIR` trains the tiny model; rank 1 is killed once, at step 4."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from tests.support.faults import at_step, config, run

if __name__ == "__main__":
    torch.set_num_threads(1)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    faults = [partial(at_step, 1, 4, partial(os.kill, os.getpid(), signal.SIGKILL))] if first else []
    sys.exit(run(config(Path(sys.argv[1]), Path(sys.argv[2])), *faults))
