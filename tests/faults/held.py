"""For torchrun: `held.py DATA RUN_DIR [CHANGES]` trains the tiny model. CHANGES: of `config`, as JSON.

Rank 0 waits before step N while RUN_DIR/hold-N exists.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.faults import BeforeStep, config, run


def wait(run_dir: Path, step: int) -> None:
    while dist.get_rank() == 0 and (run_dir / f"hold-{step}").exists():
        time.sleep(0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
    changes = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    sys.exit(run(config(data, run_dir, **changes), partial(BeforeStep, partial(wait, run_dir))))
