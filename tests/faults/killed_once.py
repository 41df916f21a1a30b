"""For torchrun: `killed_once.py DATA RUN_DIR` trains the tiny model; rank 1 is killed once, at step 4."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from olmoe_train.train import main
from tests.support.faults import at_step, config

if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        at_step(1, 4, partial(os.kill, os.getpid(), signal.SIGKILL))
    sys.exit(main(config(Path(sys.argv[1]), Path(sys.argv[2]))))
