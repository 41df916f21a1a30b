"""Run directories for the tests of reports: metrics.jsonl with all that a report shows."""

import json
from pathlib import Path
from typing import Any

from benchmarks.report_size import records

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><!-- https://example.org/ &amp;"
"""Text of a model or a configuration that would be markup, or a URL, if a report let it."""


def write_records(directory: Path, values: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in values)
    (directory / "metrics.jsonl").write_text(lines)
    return directory


def rich_records(steps: int = 60, layers: int = 3, experts: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a run with a mixture, preferences, samples, alerts, a skipped step, a NaN, a resume, a list
    by position and a metric that no registry has."""
    found = list(records(steps, layers, experts, seed))
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
    analysis = {
        "saturation": {"k": 8, "values": [[0.1, 0.2], [0.3, 0.9]]},
        "experts": [{"layer": 0, "share": 0.7}],
    }
    (directory / "analysis" / "analysis.json").write_text(json.dumps(analysis))
    return directory
