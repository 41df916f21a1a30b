"""What the scopes of the load-balancing loss cost, and how far they are from the loss of the global batch.

The quickstart's model on two gloo ranks, four micro-batches per step, on real text. The model is trained for
some steps first. Then the scopes take turns, in a new order each round:

- cost: the time of a step;
- difference: value of the loss, and its gradient in the routers, on the same weights and batches.

    python -m benchmarks.balancing data.dir [--rounds 9] [--train 60] [--micro-batch 1]
"""

import argparse
import os
import random
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cosine_similarity

from benchmarks.common import BareStep, run_ranks
from benchmarks.loop import clocks, since
from olmoe_train.config import compose
from olmoe_train.config.balancing import AuxiliaryLossConfig
from olmoe_train.config.choices import BalanceScope
from olmoe_train.config.train import TrainConfig
from olmoe_train.training.batch import Batch
from olmoe_train.training.build import build_data, train_batches
from olmoe_train.training.build_balancer import build_balancer
from olmoe_train.training.objectives.next_token import NextToken

RANKS, MICRO_BATCHES = 2, 4
SCOPES = [scope.name for scope in BalanceScope]
REFERENCE = BalanceScope.global_batch.name
# Rounds that are not counted: the first ones choose kernels and allocate.
WARM_UP = 1


@dataclass(frozen=True)
class Round:
    """One scope in one round."""

    wall: float
    """Seconds of a step."""
    cpu: float
    """Seconds of CPU of a step, on this rank."""
    loss: float
    """Load-balancing loss, over all ranks."""
    gradient: Tensor
    """Of the load-balancing loss alone, in the weights of all routers."""


def measure(cfg: TrainConfig, rounds: int, train: int) -> list[dict[str, Round]]:
    """On a rank: the results of each round by scope."""
    torch.manual_seed(0)
    step = BareStep(cfg)
    objectives = {}
    for scope in SCOPES:
        of_scope = replace(cfg, balancing=AuxiliaryLossConfig(scope=BalanceScope[scope]))
        step.model.set_balancer(build_balancer(of_scope, step.model.config))
        objectives[scope] = NextToken(step.model, step.device)
    stream = iter(train_batches(cfg, build_data(cfg), start_sample=0))
    for _ in range(train):
        run_step(step, objectives[REFERENCE], list(islice(stream, MICRO_BATCHES)))
    order, found = random.Random(0), []
    for _ in range(WARM_UP + rounds):
        batches = list(islice(stream, MICRO_BATCHES))
        scopes = order.sample(SCOPES, len(SCOPES))
        losses = {scope: loss_and_gradient(step, objectives[scope], batches) for scope in scopes}
        times = {}
        for scope in scopes:
            dist.barrier()
            began = clocks()
            run_step(step, objectives[scope], batches)
            dist.barrier()
            times[scope] = since(began)
        found.append({scope: Round(*times[scope], *losses[scope]) for scope in SCOPES})
    return found[WARM_UP:]


def run_step(step: BareStep, objective: NextToken, batches: list[Batch]) -> None:
    totals = step.count(batches)
    objective.begin_step(step.model, batches, totals, logged=False)
    assert isinstance(step.model, FSDPModule)
    for number, batch in enumerate(batches):
        step.model.set_requires_all_reduce(number == len(batches) - 1)
        objective(step.model, batch, totals)[0].backward()
    step.update()


def loss_and_gradient(step: BareStep, objective: NextToken, batches: list[Batch]) -> tuple[float, Tensor]:
    """The load-balancing loss of a step, without its weight, and its gradient in the routers."""
    totals = step.count(batches)
    objective.begin_step(step.model, batches, totals, logged=True)
    value = torch.zeros(())
    for batch in batches:
        share = objective(step.model, batch, totals)[1]["load_balancing_loss"]
        share.backward()
        value += share.detach()
    dist.all_reduce(value)
    gradients = []
    for layer in step.model.decoder_layers:
        gradient = layer.mlp.gate.weight.grad
        assert gradient is not None
        gradients.append(whole(gradient).flatten())
    step.optimizer.zero_grad()
    return value.item(), torch.cat(gradients)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all ranks; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def report(rounds: list[dict[str, Round]]) -> None:
    """Print a table. Medians over the rounds; a ratio is the median of the rounds' ratios."""
    titles = ("scope", "step, ms", "CPU, ms", "CPU / micro_batch", "loss", "loss - global", "error", "cosine")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for scope in SCOPES:
        mine = [of_round[scope] for of_round in rounds]
        first = [of_round[SCOPES[0]] for of_round in rounds]
        exact = [of_round[REFERENCE] for of_round in rounds]
        pairs = list(zip(mine, exact, strict=True))
        errors = [float((a.gradient - b.gradient).norm() / b.gradient.norm()) for a, b in pairs]
        cosines = [float(cosine_similarity(a.gradient, b.gradient, dim=0)) for a, b in pairs]
        values = [
            f"{1e3 * median(one.wall for one in mine):.0f}",
            f"{1e3 * median(one.cpu for one in mine):.0f}",
            f"{median(a.cpu / b.cpu for a, b in zip(mine, first, strict=True)):.2f}",
            f"{median(one.loss for one in mine):.4f}",
            f"{median(a.loss - b.loss for a, b in pairs):+.4f}",
            f"{median(errors):.1%}",
            f"{median(cosines):.3f}",
        ]
        print(f"| `{scope}` | {' | '.join(values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="prepared data, from olmoe prepare data=python_stdlib")
    for name, default in (("rounds", 9), ("train", 60), ("micro-batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    sequences = options.micro_batch * RANKS * MICRO_BATCHES
    cfg = compose(
        *("experiment=quickstart", f"data.dir={options.data}", "trainer.device=cpu", "optimizer.lr=1e-3"),
        *(f"trainer.micro_batch_size={options.micro_batch}", f"trainer.global_batch_size={sequences}"),
    )
    rounds = run_ranks(RANKS, measure, cfg, options.rounds, options.train)[0]
    shape = (
        f"{RANKS} ranks x {MICRO_BATCHES} micro-batches of {options.micro_batch} x {cfg.data.sequence_length}"
    )
    print(
        f"torch {torch.__version__}, {shape} tokens, {options.rounds} rounds after {options.train} steps, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    report(rounds)


if __name__ == "__main__":
    main()
