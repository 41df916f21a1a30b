"""Time that training loses to a save: synchronous, in the background, and torch's own async_save.

    python -m benchmarks.checkpoint --rounds 5

Ranks train a model of some 25M parameters and save early in a stretch of steps. Blocked is how long the call
takes, in which no step is made. Lost is what the stretch takes more than one without a save: a write in the
background slows down the steps beside it. Rounds are interleaved, after one that does not count.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.common import BareStep, run_ranks
from olmoe_train.checkpoint.saver import Saver
from olmoe_train.checkpoint.sharded import take_snapshot
from olmoe_train.config.choices import Precision
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig
from olmoe_train.config.train import CheckpointConfig, TrainConfig, TrainerConfig
from olmoe_train.distributed.collectives import group_of_all_ranks

SEQUENCES = 8  # in all
CONFIG = TrainConfig(
    model=ModelConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
    ),
    data=DataConfig(dir="none", sequence_length=16),
    trainer=TrainerConfig(max_steps=1, precision=Precision.fp32),
)
KINDS = ("none", "synchronous", "asynchronous", "torch async_save")


def measure(rounds: int, steps: int, directory: str) -> dict[str, list[tuple[float, float]]]:
    """(seconds that `steps` steps take with a save behind the second of them, those in the call) by kind."""
    trainer = replace(CONFIG.trainer, micro_batch_size=SEQUENCES // dist.get_world_size())
    train_step = BareStep(replace(CONFIG, trainer=trainer))
    model, optimizer = train_step.model, train_step.optimizer
    batch = train_step.random_batch()
    totals = train_step.count([batch])
    savers = {
        name: Saver(
            replace(CheckpointConfig(keep=1), async_save=name == "asynchronous"),
            Path(directory) / name,
            lambda: (model, optimizer),
            saved_step=0,
        )
        for name in ("synchronous", "asynchronous")
    }
    group = group_of_all_ranks()
    for _ in range(2):
        train_step(batch, totals)
    live = take_snapshot(model, optimizer)  # shares its memory with the model and the optimizer
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    number = 1
    for kind in KINDS * (1 + rounds):
        dist.barrier()
        started, blocked, future = time.perf_counter(), 0.0, None
        for step in range(steps):
            train_step(batch, totals)
            if step != 1:
                continue
            number, called = number + 1, time.perf_counter()
            if kind in savers:
                savers[kind].save(number, {})
            elif kind == "torch async_save":
                writer = FileSystemWriter(Path(directory) / "dcp" / str(number))
                future = async_save(live.tensors, storage_writer=writer, process_group=group)
            blocked = time.perf_counter() - called
        dist.barrier()
        seconds[kind].append((time.perf_counter() - started, blocked))
        for saver in savers.values():
            saver.wait()
        if future is not None:
            future.result()  # type: ignore[union-attr]
    return {kind: values[1:] for kind, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = run_ranks(arguments.ranks, measure, arguments.rounds, arguments.steps, directory)
    seconds = run[0]
    total, blocked = (
        {kind: statistics.median(values[at] for values in seconds[kind]) for kind in KINDS} for at in (0, 1)
    )
    print(f"{arguments.steps} steps without a save: {total['none']:.2f} s")
    print("| save | blocked, s | of the synchronous one's | lost, s |\n|---|---|---|---|")
    for kind in KINDS[1:]:
        ratio, lost = blocked[kind] / blocked["synchronous"], total[kind] - total["none"]
        print(f"| {kind} | {blocked[kind]:.3f} | {ratio:.3f} | {lost:.2f} |")


if __name__ == "__main__":
    main()
