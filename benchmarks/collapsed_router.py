"""Whether each balancing method revives a collapsed router, on the quickstart's model and data.

    python -m benchmarks.collapsed_router DATA [--steps 100] [--out OUT]

In the initial model, the routers send nearly every token to the first 4 or to the next 4 of 16 experts. The
other 8 get few tokens, and so few gradients that would change this. Each method trains this model by `olmoe
train`, on one rank. The table has the mean over layers of the max violation, and the number of experts of all
layers that had no token in the last 20 steps. balancing=none is the control.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from olmoe_train.config import compose
from olmoe_train.config.model import olmoe_config
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.reporting.run_data import METRICS

METHODS = {
    "none": [],
    "aux": [],
    "sequence": [],
    # 0.001 is for runs of many thousands of steps: here a bias must pass differences of 0.2 in 100 steps.
    "loss_free": ["balancing.bias_update_rate=0.01"],
}
STRENGTH = 4.0
"""Length of the routers' rows along one direction of the hidden states. Their inputs are about 1 there."""


def collapsed(data: str) -> OlmoeForCausalLM:
    """The quickstart's model with collapsed routers."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(olmoe_config(compose("experiment=quickstart", f"data.dir={data}").model))
    top_k = model.config.num_experts_per_tok
    with torch.no_grad():
        for layer in model.decoder_layers:
            weight_ED = layer.mlp.gate.weight
            direction_D = torch.nn.functional.normalize(torch.randn(model.config.hidden_size), dim=0)
            weight_ED[:top_k] += STRENGTH * direction_D
            weight_ED[top_k : 2 * top_k] -= STRENGTH * direction_D
    return model


def train(method: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """The logged steps of one run."""
    run_dir = options.out / method
    overrides = [
        *("experiment=quickstart", f"data.dir={options.data}", f"run_dir={run_dir}"),
        *(f"model.init_from={options.out / 'collapsed'}", f"balancing={method}", *METHODS[method]),
        *(f"trainer.max_steps={options.steps}", "trainer.log_every=1", "logging.dead_expert_steps=20"),
        *("evaluation.tasks=[]", "evaluation.prompts=[]", "evaluation.at_start=false"),
        *("checkpoint.every=0", "logging.details_every=0", "logging.wandb.mode=disabled"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "olmoe_train", "train", *overrides]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    records = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    return [record for record in records if "router/entropy" in record]


def violation(record: dict[str, float]) -> float:
    """Mean over layers of the max violation of a step."""
    of_layers = [
        value for name, value in record.items() if "/layer_" in name and name.endswith("/max_violation")
    ]
    return sum(of_layers) / len(of_layers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/collapsed_router"))
    options = parser.parse_args()
    options.out = options.out.resolve()
    collapsed(options.data).save_pretrained(options.out / "collapsed")
    print("| `balancing=` | violation, first step | last 10 steps | dead experts of 64 | training loss |")
    print("|---|---|---|---|---|")
    for method in METHODS:
        steps = train(method, options)
        last = sum(map(violation, steps[-10:])) / 10
        loss = sum(step["train/ce_loss"] for step in steps[-10:]) / 10
        dead = int(steps[-1]["router/dead_experts"])
        print(f"| `{method}` | {violation(steps[0]):.2f} | {last:.2f} | {dead} | {loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
