"""What the training loop costs beside the bare step: `train()` with its data, losses over the global batch,
metrics, logging and guard, against forward, backward, clipping and optimizer on batches that lie ready.

Both run in one process and take turns: whenever the loop asks for the first batch of a block, as many bare
steps, on those batches, are made and timed before it gets it. A block logs once, as by default. Saves are
apart (benchmarks/checkpoint.py): here there are none between the first step and the last.

    python -m benchmarks.loop [--rounds 9] [--block 10] [--threads 2] [--length 256]
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import EOS, BareStep, write_prepared
from olmoe_train.config.choices import Device, Precision, WandbMode
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
)
from olmoe_train.data.loader import TrainingData
from olmoe_train.train import train
from olmoe_train.training.batch import Batch
from olmoe_train.training.build import train_batches

VOCABULARY, SEQUENCES = 4096, 4
# Steps of each way that are not counted: the first ones choose kernels and allocate.
WARM_UP = 1


def configuration(options: argparse.Namespace, home: Path) -> TrainConfig:
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, (400, 3000), np.uint16)
    tokens[:, -1] = EOS
    documents = list(tokens)
    steps = (options.rounds + WARM_UP + 1) * options.block
    return TrainConfig(
        run_dir=str(home / "run"),
        model=ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            eos_token_id=EOS,
        ),
        data=DataConfig(
            dir=str(write_prepared(home / "data", documents, documents[:2], vocab_size=VOCABULARY)),
            sequence_length=options.length,
        ),
        trainer=TrainerConfig(
            max_steps=steps,
            global_batch_size=SEQUENCES,
            micro_batch_size=SEQUENCES,
            precision=Precision.fp32,
            device=Device.cpu,
            log_every=options.block,
        ),
        checkpoint=CheckpointConfig(every=steps),
        evaluation=EvaluationConfig(at_start=False, max_sequences=SEQUENCES),
        logging=LoggingConfig(wandb=WandbConfig(mode=WandbMode.disabled)),
    )


Times = list[tuple[float, float]]


def clocks() -> tuple[float, float]:
    """(Wall, CPU of this process) in seconds; other work on the machine is in the first alone."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = clocks()
    return wall - began[0], cpu - began[1]


def batches_with_bare_steps(cfg: TrainConfig, block: int, loop_s: Times, bare_s: Times) -> Iterator[Batch]:
    """The loop's own batches; between two blocks of them, a block of bare steps. Fills in the seconds of
    both."""
    bare, began, batches = None, (0.0, 0.0), iter(train_batches(cfg, TrainingData(cfg.data, cfg.seed), 0))
    while ready := list(itertools.islice(batches, block)):
        if bare is not None:
            loop_s.append(since(began))
        bare = bare or BareStep(cfg)
        totals = bare.count([dict(ready[0])])  # every batch has as many tokens
        began = clocks()
        for batch in ready:
            bare(batch, totals)
        bare_s.append(since(began))
        began = clocks()
        yield from ready


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rounds", 9), ("block", 10), ("threads", 2), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loop_s: Times = []
    bare_s: Times = []
    with tempfile.TemporaryDirectory() as home:
        cfg = configuration(options, Path(home))
        train(cfg, batches_with_bare_steps(cfg, options.block, loop_s, bare_s))
    # The loop's last block ends with the run's last save, and is not among its times.
    pairs = list(zip(loop_s, bare_s, strict=False))[WARM_UP:]
    print(
        f"\ntorch {torch.__version__}, {options.threads} threads, {SEQUENCES} x {options.length} tokens a "
        f"step, {len(pairs)} rounds of {options.block} steps, load average {os.getloadavg()[0]:.1f}"
    )
    for clock, name in enumerate(("wall", "CPU")):
        loop, bare = (
            [times[clock] / options.block * 1000 for times in way] for way in zip(*pairs, strict=True)
        )
        ratio = statistics.median(a / b for a, b in zip(loop, bare, strict=True))
        print(
            f"{name} time: loop {statistics.median(loop):.1f} ms per step, bare step "
            f"{statistics.median(bare):.1f} ms; loop / bare {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
