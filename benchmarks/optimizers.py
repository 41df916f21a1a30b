"""What a step costs with each optimizer: the quickstart's model, one process, fp32.

The optimizers take turns, a step of each on the same batch. The update is timed alone, too: its share falls
as a step has more tokens, because the update does not depend on them.

    python -m benchmarks.optimizers [--rounds 5] [--threads 2] [--sequences 8]
"""

import argparse
import os
import statistics
from dataclasses import replace

import torch

from benchmarks.common import BareStep
from benchmarks.loop import clocks, since
from olmoe_train.config import compose
from olmoe_train.config.choices import Device, Precision
from olmoe_train.config.optimizer import AdamWConfig, MuonConfig, NorMuonConfig

OPTIMIZERS = {"adamw": AdamWConfig(), "muon": MuonConfig(), "normuon": NorMuonConfig()}
# Rounds that are not counted: the first ones choose kernels and allocate.
WARM_UP = 1
PARTS = ("step", "clipping and update")


def build_steps(sequences: int) -> dict[str, BareStep]:
    """A step of each optimizer, with a model of its own."""
    cfg = compose("experiment=quickstart", "data.dir=unused")
    trainer = replace(
        cfg.trainer, precision=Precision.fp32, device=Device.cpu, micro_batch_size=sequences, compile=False
    )
    cfg = replace(cfg, trainer=trainer)
    return {name: BareStep(replace(cfg, optimizer=optimizer)) for name, optimizer in OPTIMIZERS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rounds", 5), ("threads", 2), ("sequences", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = build_steps(options.sequences)
    # Per optimizer and part of the step: (wall, CPU of this process) in seconds, one pair per round.
    spent: dict[str, dict[str, list[tuple[float, float]]]] = {
        part: {name: [] for name in steps} for part in PARTS
    }
    for _ in range(WARM_UP + options.rounds):
        batch = steps["adamw"].random_batch()
        for name, step in steps.items():
            began = clocks()
            step.backward(dict(batch), step.count([dict(batch)]))
            before_update = clocks()
            step.update()
            for part, start in zip(PARTS, (began, before_update), strict=True):
                spent[part][name].append(since(start))
    cfg = steps["adamw"].cfg
    parameters = sum(parameter.numel() for parameter in steps["adamw"].model.parameters())
    print(
        f"torch {torch.__version__}, {options.threads} threads, {parameters:,} parameters, "
        f"{options.sequences} x {cfg.data.sequence_length} tokens per step, {options.rounds} rounds, load "
        f"average {os.getloadavg()[0]:.1f}"
    )
    for part, of_part in spent.items():
        for clock, title in enumerate(("wall", "CPU")):
            seconds = {name: [pair[clock] for pair in pairs[WARM_UP:]] for name, pairs in of_part.items()}
            pairs_of = {name: zip(times, seconds["adamw"], strict=True) for name, times in seconds.items()}
            ratios = ", ".join(
                f"{name} / adamw {statistics.median(a / b for a, b in pairs):.2f}"
                for name, pairs in pairs_of.items()
                if name != "adamw"
            )
            medians = ", ".join(
                f"{name} {1e3 * statistics.median(times):.1f} ms" for name, times in seconds.items()
            )
            print(f"{part}, {title} time: {medians}; {ratios}")


if __name__ == "__main__":
    main()
