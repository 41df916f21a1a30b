"""What a run came to, at the end of quickstart.sh: `python launch/summary.py RUN_DIR DATA_DIR HF_DIR`."""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

BARS = "▁▂▃▄▅▆▇█"


def main(run_dir: str, data_dir: str, hf_dir: str) -> None:
    metrics = Path(run_dir) / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    evaluations = [r for r in records if "eval/validation/loss" in r]
    steps = [r for r in records if "train/loss" in r]
    unigram = json.loads((Path(data_dir) / "manifest.json").read_text())["unigram_entropy"]
    rows = [
        *losses(evaluations[0], evaluations[-1]),
        *tasks([r for r in records if "eval/tasks" in r]),
        ("unigram entropy", f"{unigram:.4f} nats per token: the loss of guessing by frequency only"),
        ("speed", f"{statistics.median(r['perf/tokens_per_second'] for r in steps):,.0f} tokens/s"),
        *balance(steps[-1]),
        ("run directory", str(Path(run_dir).resolve())),
        ("HF checkpoint", str(Path(hf_dir).resolve())),
        ("metrics", str(metrics.resolve())),
        (
            "report",
            f"{(Path(run_dir) / 'report.html').resolve()} (open it in a browser: is the router healthy?)",
        ),
    ]
    print("\n".join(f"{name:20} {text}" for name, text in rows))


def losses(first: dict[str, Any], last: dict[str, Any]) -> list[tuple[str, str]]:
    def pair(key: str, digits: int) -> str:
        return f"{first[key]:,.{digits}f} -> {last[key]:,.{digits}f}"

    steps = f"(step {first['step']} -> step {last['step']})"
    return [
        ("validation loss", f"{pair('eval/validation/loss', 4)} nats per token {steps}"),
        ("perplexity", pair("eval/validation/perplexity", 2)),
    ]


def tasks(evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One row per downstream task of the last evaluation. Nothing of a run without tasks."""
    rows = []
    for one in evaluations[-1]["eval/tasks"] if evaluations else []:
        score, error = (math.nan if one[key] is None else one[key] for key in ("score", "stderr"))
        chance = "" if one["chance"] is None else f" (guessing: {one['chance']:.2f})"
        text = f"{one['metric']} {score:.2f} ± {error:.2f}{chance}, {one['questions']:,} questions"
        rows.append((f"task {one['task']}", text))
    return rows


def balance(step: dict[str, Any]) -> list[tuple[str, str]]:
    """How the last logged step used its experts: one bar per expert, full height at twice its fair share.
    Nothing of a dense model."""
    loads = [step[key] for key in sorted(step) if key.startswith("router/layer_") and key.endswith("/load")]
    if len(loads[0]) == 1:
        return []
    busiest, uniform = 1 + step["router/max_violation"], math.log(len(loads[0]))
    text = (
        f"the busiest expert has {busiest:.2f} x its fair share, {step['router/dead_experts']:.0f} are dead; "
        f"router entropy {step['router/entropy']:.2f} of at most {uniform:.2f}"
    )
    pictures = []
    for layer, load in enumerate(loads):
        bars = "".join(BARS[min(7, int(4 * share * len(load)))] for share in load)
        pictures.append((f"  layer {layer}", bars))
    return [("balance of experts", text), *pictures]


if __name__ == "__main__":
    main(*sys.argv[1:])
