"""Run directories for the tests of reports: metrics.jsonl with all that a report shows."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.task_records import task_values

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!-- https://example.org/ &amp;"
"""Text of a model or a configuration that would be markup, or a URL, if a report let it."""


ANALYSIS = {
    "format": "as olmoe analyze writes",
    "saturation": [{"source": 0, "k": k, "chance": k / 8, "by_layer": [0.5, 0.6, 0.9]} for k in (1, 8)],
    "domains": [{"domain": name, "by_layer": [[0.1, 0.2, None, 0.4]] * 3} for name in ("code", "web")],
    "coactivation": [
        {"rule": "all", "layers": [{"layer": 0, "highest": [[0, 1, 0.5]], "matrix": [[0.1] * 8] * 8}]}
    ],
    "words": [{"layer": 1, "expert": 2, "tokens": [{"id": 3, "text": EVIL, "share": 0.9}]}],
}


def write_records(directory: Path, values: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in values)
    (directory / "metrics.jsonl").write_text(lines)
    return directory


def plain_records(steps: int, layers: int, experts: int, seed: int) -> Iterator[dict[str, Any]]:
    """Records of a training with a mixture of two sources that skipped a step and resumed in its middle."""
    random = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        loads_LE = random.dirichlet(np.full(experts, 9.0), layers)
        loss, second_half = 2 + 6 * math.exp(-6 * step / steps) + random.normal() / 20, step > steps // 2
        values = {"step": step, "tokens": 512 * step, "time": 1.7e9 + step, "resumes": int(second_half)}
        values |= {
            "train/loss": loss,
            "train/ce_loss": loss,
            "train/lr": 1e-3 / step,
            "train/grad_norm": 1 + loss,
        }
        values |= {
            "train/skipped_steps": int(second_half),
            "perf/tokens_per_second": 900 + loss,
            "perf/mfu": 0.3,
        }
        values |= {
            "router/max_violation": loads_LE.max() * experts - 1,
            "router/entropy": 1.9,
            "data/a/loss": loss,
        }
        values |= {
            "router/dead_experts": 0,
            "data/a/share": 0.7 + 1 / (9 * step),
            "data/a/requested_share": 0.7,
        }
        values |= {"data/b/share": 0.3 - 1 / (9 * step), "data/b/requested_share": 0.3}
        for layer in range(layers):
            values |= {f"router/layer_{layer:02d}/load": loads_LE[layer].tolist()}
            values |= {
                f"router/layer_{layer:02d}/entropy": 1.9 - layer / 10,
                f"router/layer_{layer:02d}/dead_experts": 0,
            }
        if step % (steps // 5) == 0:
            values |= {"eval/validation/loss": loss, "eval/validation/perplexity": math.exp(loss)}
            values |= {"eval/validation/bits_per_byte": loss / 3} | task_values(0.2 + 0.4 * step / steps)
        yield values


def rich_records(steps: int = 60, layers: int = 3, experts: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a run with a mixture, preferences, samples, alerts, a skipped step, a NaN, a resume, a list
    by position and a metric that no registry has."""
    found = list(plain_records(steps, layers, experts, seed))
    for record in found:
        step = record["step"]
        record |= {"rewards/margins": step / steps, "rewards/accuracies": 0.5 + step / (3 * steps)}
        record |= {
            "train/loss_by_position": [8.0 - i - step / steps for i in range(4)],
            "my/own_metric": step**2,
        }
    found[20]["train/grad_norm"] = None
    found[30]["alerts"] = [{"name": "dead_expert", "text": f"layer 1, expert 2 is dead {EVIL}"}]
    found[-1]["eval/samples"] = [{"prompt": "def main(", "completion": f"args): {EVIL}"}]
    found[-1]["eval/validation/rewards/margins"] = 0.7
    return found


def write_rich_run(directory: Path, **sizes: int) -> Path:
    """A run directory with everything beside metrics.jsonl, too."""
    write_records(directory, rich_records(**sizes))
    data_dir = directory / "data"
    data_dir.mkdir()
    (data_dir / "manifest.json").write_text('{"unigram_entropy": 6.5}')
    config = {
        "model": {"num_experts_per_tok": 2, "num_experts": 8},
        "data": {"dir": str(data_dir), "mixture": []},
    }
    config |= {"logging": {"wandb": {"name": EVIL}}, "seed": sizes.get("seed", 0)}
    (directory / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    status = {"state": "done", "reason": "reached the last step", "step": 60, "last_step": 60, "time": 1.0}
    (directory / "status.json").write_text(json.dumps(status))
    (directory / "analysis").mkdir()
    (directory / "analysis" / "analysis.json").write_text(json.dumps(ANALYSIS))
    return directory
