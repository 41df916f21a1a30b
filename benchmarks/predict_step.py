"""Is the cost model of `olmoe plan` right? Steps of gloo ranks, predicted and measured.

    python -m benchmarks.predict_step [--rounds 5] [--ranks 1 2 4]

The rates that the model needs are measured in the same processes, between the steps: FLOP/s of a model
without any parallelism, bandwidth of collectives as large as those of a layer, and bandwidth of memory. All
ranks share the cores of one machine, so that nothing is hidden behind computation (cost.overlap=0).

Times are those of the CPU that a rank uses, its threads for gloo included, because other work on the machine
changes them less; what a rank waits for another is not in them. Ratios of wall-clock times are printed, too.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from benchmarks.common import BareStep, run_ranks
from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.planning.cost import Rates, StepCost, step_cost
from olmoe_train.planning.flops import train_flops_per_token
from olmoe_train.planning.memory import rank_memory
from olmoe_train.planning.report import plan_layout, plan_micro_batch
from olmoe_train.planning.traffic import Links, step_traffic

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_experts=16,
    num_experts_per_tok=4,
)
LENGTH, MICRO_BATCHES = 64, 1
ELEMENTS = 2**21  # of a collective, about those of a layer


@dataclass(frozen=True)
class Layout:
    """A layout that is measured."""

    strategy: Strategy = Strategy.fsdp
    experts: int = 1
    copies: int = 1
    mode: ActivationCheckpointing = ActivationCheckpointing.none

    def __str__(self) -> str:
        words = [self.strategy.value]
        words += [f"EP {self.experts}"] if self.experts > 1 else []
        words += [f"{self.copies} copies"] if self.copies > 1 else []
        words += [self.mode.value] if self.mode is not ActivationCheckpointing.none else []
        return ", ".join(words)

    def config(self) -> TrainConfig:
        """One sequence per micro-batch."""
        return TrainConfig(
            model=MODEL,
            data=DataConfig(dir="none", sequence_length=LENGTH),
            trainer=TrainerConfig(max_steps=1, precision=Precision.fp32, activation_checkpointing=self.mode),
            parallel=ParallelConfig(self.strategy, self.experts, self.copies),
        )


FULL, SELECTIVE = ActivationCheckpointing.full, ActivationCheckpointing.selective
LAYOUTS = {
    1: [Layout(), Layout(mode=SELECTIVE), Layout(mode=FULL)],
    2: [
        Layout(),
        Layout(mode=FULL),
        Layout(experts=2),
        Layout(Strategy.ddp),
        Layout(Strategy.ddp, experts=2),
    ],
    4: [
        Layout(),
        Layout(mode=FULL),
        Layout(experts=2),
        Layout(experts=4),
        Layout(copies=2),
        Layout(Strategy.ddp),
    ],
}


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the CPU and of the clock that it takes."""
    dist.barrier()
    started, used = time.perf_counter(), time.process_time()
    work()
    used = time.process_time() - used
    dist.barrier()
    return used, time.perf_counter() - started


def measure(layouts: list[Layout], rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of the seconds of each layout's step and of the work that rates follow from, by name.

    Rounds take turns.
    """
    steps = [BareStep(layout.config()) for layout in layouts]
    works: dict[str, Callable[[], None]] = {
        str(layout): _step(step) for layout, step in zip(layouts, steps, strict=True)
    }
    works |= {"arithmetic": _arithmetic(steps[0]), "memory": _memory()}
    if dist.get_world_size() > 1:
        works["links"] = _collectives()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            needed = seconds(work)
            if number:  # the first round warms up
                found[name].append(needed)
    return {
        name: (statistics.median(used for used, _ in values), statistics.median(clock for _, clock in values))
        for name, values in found.items()
    }


def _step(step: BareStep) -> Callable[[], None]:
    batches = [step.random_batch() for _ in range(MICRO_BATCHES)]
    totals = step.count(batches)

    def work() -> None:
        for index, batch in enumerate(batches):
            if dist.get_world_size() > 1:
                step.model.set_requires_all_reduce(index == MICRO_BATCHES - 1)  # type: ignore[operator]
            step.backward(batch, totals)
        step.update()

    return work


def _arithmetic(step: BareStep) -> Callable[[], None]:
    """Forward and backward of one micro-batch on every rank for itself."""
    model, batch = OlmoeForCausalLM(olmoe_config(MODEL)), step.random_batch()

    def work() -> None:
        loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        assert loss is not None
        loss.backward()
        model.zero_grad()

    return work


def _memory() -> Callable[[], None]:
    """Two reads and a write of each element."""
    first, second = torch.zeros(4 * ELEMENTS), torch.zeros(4 * ELEMENTS)

    def work() -> None:
        first.add_(second)

    return work


def _collectives() -> Callable[[], None]:
    """One all-gather, one reduce-scatter and one all-to-all."""
    ranks = dist.get_world_size()
    whole, part = torch.zeros(ELEMENTS), torch.zeros(ELEMENTS // ranks)
    other = torch.zeros(ELEMENTS)

    def work() -> None:
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_to_all_single(other, whole)

    return work


def rates_of(measured: dict[str, float], ranks: int) -> Rates:
    """Rates of one rank, from the seconds of the work above."""
    flops = train_flops_per_token(olmoe_config(MODEL), LENGTH).total * LENGTH / measured["arithmetic"]
    memory = 3 * 4 * 4 * ELEMENTS / measured["memory"]
    link = 3 * 4 * ELEMENTS * (ranks - 1) / ranks / measured["links"] if ranks > 1 else 1.0
    return Rates(flops, memory, Links(gpus_per_node=ranks, nvlink=link, network=link), overlap=0.0)


def predict(layout: Layout, ranks: int, rates: Rates) -> StepCost:
    """What the cost model says of a step of MICRO_BATCHES micro-batches, with even routing."""
    cfg, config = layout.config(), olmoe_config(MODEL)
    plan = PlanConfig(model=cfg.model, data=cfg.data, trainer=cfg.trainer, parallel=cfg.parallel, gpus=ranks)
    of_ranks, batch = plan_layout(plan), replace(plan_micro_batch(plan), sequences=1)
    traffic = step_traffic(config, of_ranks, batch, MICRO_BATCHES, rates.links)
    flops = train_flops_per_token(config, LENGTH)
    memory = rank_memory(config, of_ranks, batch)
    return step_cost(config, flops, batch, MICRO_BATCHES, memory, traffic, rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    arguments = parser.parse_args()
    columns = ("ranks", "layout", "CPU, ms", "predicted, ms", "predicted / measured", "by the clock")
    print(f"| {' | '.join(columns)} | arithmetic | links |")
    print(f"|{' --- |' * 8}")
    for ranks in arguments.ranks:
        layouts = LAYOUTS[ranks]
        measured = run_ranks(ranks, measure, layouts, arguments.rounds)[0]
        rates = [rates_of({name: times[of] for name, times in measured.items()}, ranks) for of in (0, 1)]
        for layout in layouts:
            used, clock = measured[str(layout)]
            cost, by_clock = (predict(layout, ranks, of) for of in rates)
            links = (cost.exposed + cost.all_to_all) / cost.total
            cells = [str(ranks), str(layout), f"{1e3 * used:.0f}", f"{1e3 * cost.total:.0f}"]
            cells += [f"{cost.total / used:.2f}", f"{by_clock.total / clock:.2f}"]
            print(f"| {' | '.join([*cells, f'{cost.arithmetic / cost.total:.0%}', f'{links:.0%}'])} |")
        for name, of in zip(("CPU", "clock"), rates, strict=True):
            values = {"FLOP/s": of.flops, "B/s of memory": of.memory, "B/s of links": of.links.nvlink}
            print(f"{name}:", ", ".join(f"{value / 1e9:.2f} G{unit}" for unit, value in values.items()))
        print(flush=True)


if __name__ == "__main__":
    main()
