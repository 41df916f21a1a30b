"""A mixture, its dense comparator and the mixture upcycled from it: tokens/s, and validation loss by tokens.

    olmoe prepare data=python_stdlib data.dir=prepared/py
    python -m benchmarks.moe_against_dense --data prepared/py --runs runs/comparison

A small version of arXiv 2409.02060, sections 4.1.1 and 4.1.5: model=olmoe_quickstart and its dense comparator
have the same active parameters, and train with experiment=quickstart on one process each.

- Speed: both in one process, a step of each in turn, after two that do not count.
- From scratch: both on the same tokens in the same order, at the same time, a core each.
- Upcycled: the dense model that came of it goes on for `--more` steps; the mixture upcycled from it trains
  for as many, and so does a new mixture, on the same other tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import run_ranks
from benchmarks.growth import seconds_a_step
from olmoe_train.config.compose import compose

MIXTURE, DENSE = "olmoe_quickstart", "olmo_dense_quickstart"
# On one rank; and a step in one forward pass, since several would cost a mixture a second one each.
ONE_RANK = ("parallel.expert_parallel_size=1", "trainer.micro_batch_size=8")


def compare_speed(rounds: int) -> None:
    configs = [
        compose("experiment=quickstart", f"model={model}", "data.dir=none", *ONE_RANK)
        for model in (MIXTURE, DENSE)
    ]
    tokens = configs[0].trainer.global_batch_size * configs[0].data.sequence_length
    mixture, dense = run_ranks(1, seconds_a_step, configs, rounds)[0]
    ratios = sorted(a / b for a, b in zip(mixture, dense, strict=True))
    # Of the fastest quarter: other work on the cores makes a step longer, never shorter.
    rates = [tokens / statistics.quantiles(seconds, n=4)[0] for seconds in (mixture, dense)]
    print(
        f"tokens/s, fastest quarter of {rounds} steps: mixture {rates[0]:,.0f}, dense {rates[1]:,.0f}; "
        f"mixture / dense, time of a step: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}",
        flush=True,
    )


def start(name: str, steps: int, arguments: argparse.Namespace, *overrides: str) -> subprocess.Popen[bytes]:
    """`olmoe train` of one run; one that is done already ends at once."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
        *("-m", "olmoe_train.train", "experiment=quickstart", "logging.wandb.mode=disabled"),
        *ONE_RANK,
        *(f"data.dir={arguments.data}", f"run_dir={arguments.runs}/{name}", f"trainer.max_steps={steps}"),
        *(f"evaluation.every={max(1, steps // 4)}", "checkpoint.every=50", *overrides),
    ]
    with (arguments.runs / f"{name}.txt").open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def losses(runs: dict[str, subprocess.Popen[bytes]], arguments: argparse.Namespace) -> None:
    """A table of validation losses, once the runs have ended."""
    tables = []
    for name, process in runs.items():
        if process.wait():
            sys.exit(f"{name} failed: see {arguments.runs / name}.txt")
        lines = (arguments.runs / name / "metrics.jsonl").read_text().splitlines()
        key = "eval/validation/loss"
        tables.append({r["step"]: r[key] for r in map(json.loads, lines) if key in r})
    print("| step | " + " | ".join(runs) + " |\n|---|" + "---|" * len(runs))
    for step in tables[0]:
        print(f"| {step} | " + " | ".join(f"{table[step]:.4f}" for table in tables) + " |", flush=True)


def olmoe(verb: str, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", "olmoe_train", verb, *overrides], check=True)


def compare_losses(arguments: argparse.Namespace) -> None:
    models = {"mixture": MIXTURE, "dense": DENSE}
    losses(
        {name: start(name, arguments.steps, arguments, f"model={models[name]}") for name in models}, arguments
    )
    dense, upcycled = f"{arguments.runs}/dense-hf", f"{arguments.runs}/upcycled-hf"
    olmoe("export", f"source={arguments.runs}/dense", f"out={dense}")
    shape = ("num_experts=16", "num_experts_per_tok=4", "intermediate_size=64")
    olmoe("upcycle", f"source={dense}", f"out={upcycled}", *shape, f"data_dir={arguments.data}")
    other_order = "seed=1"
    more = {
        "dense_goes_on": (f"model={DENSE}", f"model.init_from={dense}"),
        "upcycled": (f"model={MIXTURE}", "model.norm_topk_prob=true", f"model.init_from={upcycled}"),
        "new_mixture": (f"model={MIXTURE}",),
    }
    losses(
        {name: start(name, arguments.more, arguments, other_order, *more[name]) for name in more}, arguments
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="data.dir of the standard library, prepared")
    parser.add_argument("--runs", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--steps", type=int, default=200, help="of 2,048 tokens")
    parser.add_argument("--more", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    compare_speed(arguments.rounds)
    compare_losses(arguments)


if __name__ == "__main__":
    main()
