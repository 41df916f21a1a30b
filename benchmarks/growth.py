"""Does anything grow faster than its work? One training step at more experts, longer sequences, more layers
and more ranks, everything else as it is.

Experts 8 to 128 at the same active parameters (4 of them, 64 wide, whatever their number), sequences of 512
to 8,192 at the same tokens per step, 2 to 16 layers, and 1, 2 and 4 gloo ranks with and without expert
parallelism at the same global batch. Prints tokens/s, and arithmetic per second (forward, backward; flops.py)
relative to the first line of each group: where that falls, time grows faster than the work. float32; what a
group compares is stepped in turn, where it runs on as many ranks.

    python -m benchmarks.growth [--rounds 7] [--threads 2] [--plot benchmarks/growth.svg]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from benchmarks.common import BareStep, run_ranks
from olmoe_train.config.choices import Precision
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.planning.flops import train_flops_per_token

WARM_UP = 2
TOKENS = 8192
BASE = ModelConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_experts=32,
    num_experts_per_tok=4,
    max_position_embeddings=8192,
    eos_token_id=0,
)


@dataclass(frozen=True)
class Point:
    group: str
    value: int
    model: ModelConfig = BASE
    length: int = 512
    ranks: int = 1
    expert_parallel: int = 1

    @property
    def name(self) -> str:
        return f"{self.value}" + (f", EP {self.expert_parallel}" if self.expert_parallel > 1 else "")

    @property
    def config(self) -> TrainConfig:
        sequences = TOKENS // self.length
        return TrainConfig(
            model=self.model,
            data=DataConfig(dir="none", sequence_length=self.length),
            trainer=TrainerConfig(
                max_steps=1,
                global_batch_size=sequences,
                micro_batch_size=sequences // self.ranks,
                precision=Precision.fp32,
            ),
            parallel=ParallelConfig(expert_parallel_size=self.expert_parallel),
        )


POINTS = [
    *(Point("experts", n, replace(BASE, num_experts=n)) for n in (8, 16, 32, 64, 128)),
    *(Point("sequence", n, length=n) for n in (512, 1024, 2048, 4096, 8192)),
    *(Point("layers", n, replace(BASE, num_hidden_layers=n)) for n in (2, 4, 8, 16)),
    *(Point("ranks", n, ranks=n) for n in (1, 2, 4)),
    *(Point("ranks", n, ranks=n, expert_parallel=n) for n in (2, 4)),
]


def on_random_tokens(step: BareStep) -> Callable[[], None]:
    """The step, with its batch and counts made anew every time."""

    def call() -> None:
        batch = step.random_batch()
        step(batch, step.count([batch]))

    return call


def seconds_a_step(configs: list[TrainConfig], rounds: int, threads: int | None = None) -> list[list[float]]:
    """Seconds of every round on this rank, by configuration. A round makes a step of each of them in turn.

    threads: the threads of this rank; None leaves the number as it is.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    steps = [on_random_tokens(BareStep(cfg)) for cfg in configs]
    for step in steps * WARM_UP:
        step()
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, times in zip(steps, seconds, strict=True):
            dist.barrier()
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return seconds


def measure(points: list[Point], rounds: int, threads: int) -> list[float]:
    """Seconds of a step of each point; those on as many ranks share processes."""
    found: dict[str, float] = {}
    for ranks in sorted({point.ranks for point in points}):
        together = [point for point in points if point.ranks == ranks]
        configs = [point.config for point in together]
        times = run_ranks(ranks, seconds_a_step, configs, rounds, max(1, threads // ranks))
        for point, of_one in zip(together, times[0], strict=True):
            found[point.name] = statistics.median(of_one)
    return [found[point.name] for point in points]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--groups", nargs="+", default=["experts", "sequence", "layers", "ranks"])
    parser.add_argument("--plot", help="file to draw to, .svg or .png (needs matplotlib)")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {args.threads} threads, {TOKENS} tokens per step, "
        f"medians of {args.rounds}"
    )
    lines: dict[str, list[tuple[str, float]]] = {}
    for group in args.groups:
        points = [point for point in POINTS if point.group == group]
        first = 0.0
        for point, seconds in zip(points, measure(points, args.rounds, args.threads), strict=True):
            work = train_flops_per_token(olmoe_config(point.model), point.length).total * TOKENS / seconds
            first = first or work
            lines.setdefault(group, []).append((point.name, work / first))
            print(
                f"| {group} {point.name} | {TOKENS / seconds:,.0f} | {work / 1e9:.1f} | {work / first:.2f} |",
                flush=True,
            )
    if args.plot:
        plot(lines, args.plot)


def plot(lines: dict[str, list[tuple[str, float]]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(lines), figsize=(3.2 * len(lines), 2.8), sharey=True, squeeze=False)
    for axis, (group, values) in zip(axes[0], lines.items(), strict=True):
        axis.plot([name for name, _ in values], [value for _, value in values], marker="o")
        axis.axhline(1.0, linewidth=0.8, linestyle=":", color="grey")
        axis.set_title(group)
        axis.tick_params(axis="x", labelrotation=30)
    axes[0][0].set_ylim(0, 1.05 * max(value for values in lines.values() for _, value in values))
    axes[0][0].set_ylabel("FLOP/s relative to the first")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
