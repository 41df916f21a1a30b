"""Every variant of the pretraining laboratory on the quickstart's model and data: one table, several seeds.

    python -m benchmarks.laboratory data.dir=DIR [--out OUT] [--steps 100] [--seeds 3] [--at-once 2]

Each run is `olmoe train experiment=quickstart` with the overrides of its variant, on one rank with one
thread; --at-once processes train one run after the other. The variants take turns: the first seed of all of
them, then the second, so that a change of the machine's load meets every variant. Running the command again
continues. OUT holds the runs and the table. A run has the initial weights and the data of the quickstart with
the same seed, so the table has the mean of their differences, too, with the smallest and the largest one.
"""

import argparse
import multiprocessing
import os
import statistics
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from olmoe_train.cli.multirun import SweptRun, is_done, record
from olmoe_train.config import compose
from olmoe_train.reporting.run_data import read_object
from olmoe_train.reporting.sweep import RUNS, TABLE, Result, read_result, spread, table_line
from olmoe_train.train import train

ABLATIONS = (
    "granularity_8",
    "granularity_32",
    "granularity_64",
    "granularity_128",
    "shared_expert",
    "shared_expert_none",
    "expert_choice",
    "dense",
    "upcycling",
    "no_z_loss",
    "no_qk_norm",
    "normal_init",
    "nonparametric_norm",
    "no_decay_norm",
    "no_decay_embedding",
    "adamw_eps_1e_5",
)
VARIANTS: dict[str, list[str]] = {
    "quickstart": [],
    "optimizer=muon": ["optimizer=muon"],
    "optimizer=normuon": ["optimizer=normuon"],
    "optimizer.moments_dtype=bf16": ["optimizer.moments_dtype=bf16"],
    "scheduler=wsd": ["scheduler=wsd"],
    "trainer.ema_decay=0.99": ["trainer.ema_decay=0.99"],
    **{f"balancing={name}": [f"balancing={name}"] for name in ("loss_free", "sequence", "none")},
    **{f"balancing.scope={name}": [f"balancing.scope={name}"] for name in ("micro_batch", "running")},
    "balancing.router_jitter=0.01": ["balancing.router_jitter=0.01"],
    **{f"ablation={name}": [f"ablation={name}"] for name in ABLATIONS},
}
"""Name of a variant -> its overrides of experiment=quickstart. On one rank all_ranks is micro_batch, and
ablation=no_load_balancing_loss is balancing=none. ablation=upcycling starts from scratch here."""
COMMON = [
    "experiment=quickstart",
    "trainer.micro_batch_size=4",
    "trainer.device=cpu",
    "evaluation.at_start=false",
    "evaluation.tasks=[]",
    "evaluation.prompts=[]",
    "checkpoint.every=0",
    "logging.wandb.mode=disabled",
    "logging.details_every=0",
]


def discard_output() -> None:
    """Send what this process prints nowhere; log.txt in each run directory has it, too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def train_one(overrides: list[str], run_dir: Path) -> str:
    """Train one run; a line that says how it ended."""
    try:
        train(compose(*overrides, f"run_dir={run_dir}"))
    except Exception:
        return f"{run_dir.name}: failed\n{traceback.format_exc()}"
    return f"{run_dir.name}: done"


def table(out: Path) -> str:
    """The runs of OUT as Markdown, a row per variant, the best loss first. ±: of one run, as stdev is."""
    results: dict[str, list[Result]] = {}
    for name, run in read_object(out / RUNS).items():  # the seeds in the same order for all variants
        results.setdefault(run["values"]["variant"], []).append(read_result(out / name))
    reference = results["quickstart"]
    rows = []
    for variant, runs in sorted(results.items(), key=lambda item: sum(run.loss for run in item[1])):
        less = [run.loss - other.loss for run, other in zip(runs, reference, strict=True)]
        step = [run.step_seconds / other.step_seconds for run, other in zip(runs, reference, strict=True)]
        cells = [
            f"`{variant}`",
            spread([run.loss for run in runs], 3),
            f"{statistics.fmean(less):+.3f} ({min(less):+.3f} to {max(less):+.3f})",
            spread([run.violation for run in runs], 2),
            f"{statistics.median(step):.2f}",
        ]
        rows.append(table_line(cells))
    head = "| variant | validation loss | less that of the quickstart | max violation | step time, relative |"
    return "\n".join([head, "|---" * 5 + "|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="further overrides of every run; data.dir is needed")
    parser.add_argument("--out", type=Path, default=Path("runs/laboratory"))
    for name, default in (("steps", 100), ("seeds", 3), ("at-once", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_intermixed_args()
    if "quickstart" not in options.only:
        parser.error("--only: needs quickstart, which the others are compared with")
    options.out = options.out.resolve()
    common = [*COMMON, f"trainer.max_steps={options.steps}", *options.overrides]
    runs = [
        SweptRun({"variant": variant, "seed": str(seed)}, [*common, f"seed={seed}", *VARIANTS[variant]])
        for seed in range(options.seeds)
        for variant in options.only
    ]
    left = [run for run in runs if not is_done(options.out, run)]
    record(options.out, runs)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.at_once, context, initializer=discard_output) as pool:
        directories = [options.out / run.name for run in left]
        for line in pool.map(train_one, [run.overrides for run in left], directories):
            print(line, flush=True)
    (options.out / TABLE).write_text(table(options.out) + "\n")
    print(table(options.out))


if __name__ == "__main__":
    main()
