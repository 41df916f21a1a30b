"""How large is a report, and how long does it take to write and to open? For a long run with many experts.

Writes a metrics.jsonl of --steps records with --layers x --experts loads and the metrics of a mixture of
three sources, with one spike and one burst of an expert at known steps; then makes the report as `olmoe
report` does.

    python benchmarks/report_size.py [--steps 10000] [--layers 16] [--experts 64] [--runs 1] [--keep
    report.html]
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.reporting.html_report import render
from olmoe_train.reporting.run_data import RunReader

TOP_K = 8


def records(steps: int, layers: int, experts: int, seed: int) -> Iterator[dict[str, Any]]:
    """Records as a training with a mixture of three sources logs them."""
    random = np.random.default_rng(seed)
    weights_LE = random.normal(size=(layers, experts))
    for step in range(1, steps + 1):
        done = step / steps
        spread = 0.15 + 0.8 * math.exp(-8 * done)
        loads_LE = np.exp(spread * weights_LE + 0.05 * random.normal(size=(layers, experts)))
        if step == steps // 3:
            loads_LE[layers // 2, experts // 2] *= 6
        loads_LE /= loads_LE.sum(1, keepdims=True)
        violation_L = loads_LE.max(1) * experts - 1
        entropy_L = math.log(experts) * (0.9 - 0.2 * done) + 0.02 * random.normal(size=layers)
        ce = 2.3 + 8.4 * math.exp(-9 * done) + 0.06 * random.normal() + (3.0 if step == steps // 2 else 0.0)
        values: dict[str, Any] = {"step": step, "tokens": 4_194_304 * step}
        values |= {
            "train/loss": ce + 0.012,
            "train/ce_loss": ce,
            "train/load_balancing_loss": 1.02 + 0.3 * spread,
        }
        values |= {"train/router_z_loss": 4 + random.normal() / 9, "train/lr": 4e-4 * math.cos(1.4 * done)}
        values |= {
            "train/grad_norm": 0.3 + 0.05 * random.normal() ** 2,
            "train/skipped_steps": int(2 * step > steps),
        }
        values |= {
            "perf/tokens_per_second": 3e6 + 4e4 * random.normal(),
            "perf/mfu": 0.38 + 0.004 * random.normal(),
        }
        values |= {"perf/peak_memory_gib": 61.2, "router/max_violation": float(violation_L.max())}
        values |= {"router/entropy": float(entropy_L.mean()), "router/dead_experts": 0}
        for layer in range(layers):
            name = f"router/layer_{layer:02d}"
            values |= {
                f"{name}/max_violation": float(violation_L[layer]),
                f"{name}/entropy": float(entropy_L[layer]),
            }
            values |= {f"{name}/dead_experts": 0, f"{name}/load": loads_LE[layer].tolist()}
        for source, share in (("web", 0.7), ("code", 0.2), ("papers", 0.1)):
            values |= {f"data/{source}/requested_share": share, f"data/{source}/loss": ce + share}
            values |= {f"data/{source}/share": share + random.normal() / (50 * math.sqrt(step))}
        if step % max(1, steps // 100) == 0:
            values |= {"eval/validation/loss": ce, "eval/validation/perplexity": math.exp(ce)}
        yield values | {"time": 1.7e9 + 1.4 * step, "resumes": int(step > steps // 2)}


def write_run(directory: Path, steps: int, layers: int, experts: int, seed: int = 0) -> Path:
    """Write metrics.jsonl of a run, and return the directory."""
    directory.mkdir(parents=True)
    with (directory / "metrics.jsonl").open("w") as file:
        for record in records(steps, layers, experts, seed):
            file.write(json.dumps(record) + "\n")
    config = (
        f"model: {{num_experts: {experts}, num_experts_per_tok: {min(TOP_K, experts // 2)}}}\nseed: {seed}\n"
    )
    (directory / "config.yaml").write_text(config)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="where to leave the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        runs = [
            write_run(Path(home) / f"run_{seed}", options.steps, options.layers, options.experts, seed)
            for seed in range(options.runs)
        ]
        size = sum((run / "metrics.jsonl").stat().st_size for run in runs)
        start = time.perf_counter()
        readers = [RunReader(run) for run in runs]
        for reader in readers:
            reader.update()
        read = time.perf_counter()
        page = render(readers)
        end = time.perf_counter()
    print(f"{options.runs} x {options.steps:,} steps x {options.layers} layers x {options.experts} experts")
    print(f"metrics.jsonl  {size / 1e6:,.1f} MB, read in {read - start:.2f} s")
    print(f"report.html    {len(page.encode()) / 1e6:.3f} MB, made in {end - read:.2f} s")
    if options.keep is not None:
        options.keep.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
