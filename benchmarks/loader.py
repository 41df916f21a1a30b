"""Does the loader keep up with 8 GPUs? Tokens/s of each way to make a batch, over what the GPUs need.

The need: 8 GPUs at 40,000 tokens/s each, 320,000 tokens/s in all; here one process (or two workers) makes all
of it. Batches of 4 sequences of 4,096 tokens; random documents whose lengths spread as a web corpus's do.

    python -m benchmarks.loader [--rounds 5] [--batches 40] [--workers 0]
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common import EOS, write_prepared
from olmoe_train.config.choices import Packing
from olmoe_train.config.data import DataConfig, MixtureSource
from olmoe_train.data.batch_sizes import BatchSizes
from olmoe_train.data.loader import TrainingData, build_train_loader
from olmoe_train.data.packing import open_packs
from olmoe_train.data.tokens import open_split

NEED = 8 * 40_000  # tokens/s
LENGTH, MICRO_BATCH = 4096, 4
VOCABULARY = 50_280


def write_data(directory: Path, documents: int, seed: int) -> None:
    """Documents of log-normal length (median 400 tokens, mean 820) and Zipf-like tokens.

    The same data with a loss mask are in a second directory, `directory`-masked.
    """
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(6.0, 1.2, documents), 2, 200_000).astype(np.int64)
    ends = np.cumsum(lengths)
    tokens = (2 + (VOCABULARY - 2) * generator.random(ends[-1]) ** 3).astype("<u2")
    tokens[ends - 1] = EOS
    mask = (generator.random(len(tokens)) < 0.5).astype(np.uint8)
    texts, masks = (np.split(array, ends[:-1]) for array in (tokens, mask))
    masked = directory.with_name(f"{directory.name}-masked")
    write_prepared(directory, texts, vocab_size=VOCABULARY)
    write_prepared(masked, texts, vocab_size=VOCABULARY, train_mask=masks)


def cases(root: Path, workers: int) -> dict[str, DataConfig]:
    concat = DataConfig(dir=str(root / "web"), sequence_length=LENGTH, num_workers=workers)
    mixture = [MixtureSource("web", weight=7), *(MixtureSource(f"source-{i}", weight=1) for i in range(7))]
    packed = replace(concat, packing=Packing.best_fit)
    everything = replace(
        packed,
        dir=str(root),
        mixture=[replace(source, dir=f"{source.dir}-masked") for source in mixture],
        mask_documents=True,
        repetition_filter=True,
    )
    return {
        "concat": concat,
        "concat, document masks": replace(concat, mask_documents=True),
        "concat, loss mask": replace(concat, dir=str(root / "web-masked")),
        "concat, repetition filter": replace(concat, repetition_filter=True),
        "concat, mixture of 8": replace(concat, dir=str(root), mixture=mixture),
        "best_fit": packed,
        "best_fit, document masks": replace(packed, mask_documents=True),
        "all of it": everything,
    }


def tokens_per_second(data: DataConfig, batches: int, start: int) -> float:
    """Of one rank that takes every sample, from `start` on; the first batch is not timed."""
    loader = iter(
        build_train_loader(TrainingData(data, 0), start, BatchSizes(MICRO_BATCH), 0, 1, MICRO_BATCH)
    )
    next(loader)
    began = time.perf_counter()
    for _ in itertools.islice(loader, batches):
        pass
    return batches * MICRO_BATCH * LENGTH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for seed, name in enumerate(["web", *(f"source-{i}" for i in range(7))]):
            write_data(root / name, 20_000 if name == "web" else 4_000, seed)
        began = time.perf_counter()
        split = open_split(root / "web", "train")
        packs = open_packs(split, LENGTH)
        seconds = time.perf_counter() - began
        padding = 1 - len(split) / (len(packs) * LENGTH)
        speed = len(split) / seconds / 1e6
        print(f"packing {len(split):,} tokens: {speed:,.0f}M tokens/s, {padding:.3%} padding")
        found: dict[str, list[float]] = {}
        for round_ in range(options.rounds):
            for name, data in cases(root, options.workers).items():
                speed = tokens_per_second(data, options.batches, start=round_ * 10_000)
                found.setdefault(name, []).append(speed)
    print(f"load average {os.getloadavg()[0]:.0f}; {options.workers} workers; median of {options.rounds}\n")
    print("| data | tokens/s | batches/s | over the need of 320,000 tokens/s |\n|---|---|---|---|")
    for name, speeds in found.items():
        speed = statistics.median(speeds)
        print(f"| {name} | {speed:,.0f} | {speed / LENGTH / MICRO_BATCH:,.0f} | {speed / NEED:.1f} |")


if __name__ == "__main__":
    main()
