"""What looking for spikes costs a training without any: logging.explain_spikes, on and off in turns.

The blocks of one run alternate: in every second block the callback is not called. A block has log_every steps
and logs once, and the callback reads the skip guard there. The time inside the callback is measured, too,
because the difference between two blocks is smaller than what else happens on a machine.

    python -m benchmarks.explain_idle [--rounds 11] [--block 10] [--threads 1] [--length 256]
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.loop import SEQUENCES, configuration
from olmoe_train.train import train
from olmoe_train.training.callbacks import spikes
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.callbacks.spikes import Spikes
from olmoe_train.training.state import TrainState

# Blocks at the start that are not counted: 32 steps pass before the callback knows what a spike is.
WARM_UP = 4


class Blocks(Callback):
    """Times each block of steps. `on` says whether the callback takes part in the current one."""

    def __init__(self, block: int) -> None:
        self.block, self.on = block, True
        self.block_s: list[float] = []
        self.inside_s = 0.0
        self._began = time.perf_counter()

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if state.step % self.block == 0:
            now = time.perf_counter()
            self.block_s.append(now - self._began)
            self._began, self.on = now, not self.on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rounds", 11), ("block", 10), ("threads", 1), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    blocks = Blocks(options.block)
    original = Spikes.on_step
    calls = 0

    def in_turns(self: Spikes, state: TrainState, report: StepReport) -> None:
        nonlocal calls
        if blocks.on:
            began = time.perf_counter()
            original(self, state, report)
            blocks.inside_s += time.perf_counter() - began
            calls += 1

    options.rounds = 2 * options.rounds + WARM_UP
    # The loss on random tokens hardly varies, so that any change of it would count as a spike.
    never = patch.object(spikes, "SIGMAS", math.inf)
    with tempfile.TemporaryDirectory() as home, patch.object(Spikes, "on_step", in_turns), never:
        train(configuration(options, Path(home)), callbacks=(blocks,))
    counted = blocks.block_s[WARM_UP : options.rounds]  # the last blocks hold the save
    pairs = list(zip(counted[::2], counted[1::2], strict=True))
    on, off = (statistics.median(times) / options.block * 1000 for times in zip(*pairs, strict=True))
    ratio = statistics.median(mine / other for mine, other in pairs)
    inside = blocks.inside_s / calls * 1e6
    print(
        f"\ntorch {torch.__version__}, {options.threads} threads, {SEQUENCES} x {options.length} tokens a "
        f"step, {len(pairs)} rounds of {options.block} steps, load average {os.getloadavg()[0]:.1f}\n"
        f"with {on:.1f} ms per step, without {off:.1f} ms; with / without {ratio:.4f} (median of neighbors)\n"
        f"inside the callback {inside:.1f} us per step, {inside / on / 10:.3f}% of a step"
    )


if __name__ == "__main__":
    main()
