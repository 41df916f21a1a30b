"""Is `olmoe plan` right? Train two steps on real ranks, and hold what was measured against what was planned.

Parameters, gradients and AdamW moments are the storages that the rank holds after backward. The peak counts
the bytes of all tensor storages alive at each operator of the second step: FSDP's gathered weights and
buffers, activations and temporaries, but nothing that an operator allocates and frees inside itself. The
growth of the resident set has those too, and all the rest: buffers of gloo and oneDNN, the allocator's free
lists, code loaded late, the objects of autograd and Python. It is printed, not judged.

    python -m benchmarks.plan_memory [--ranks 2]
"""

import argparse
import resource
from dataclasses import dataclass

import torch

from benchmarks.common import BareStep, run_ranks
from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.config.verbs import PlanConfig
from olmoe_train.planning.live_memory import LiveBytes, held_bytes
from olmoe_train.planning.memory import RankMemory, rank_memory
from olmoe_train.planning.report import plan_layout, plan_micro_batch

MIB = 2**20


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    resident_growth: int


def measure(cfg: TrainConfig) -> Measured:
    """Two optimizer steps of two micro-batches of random tokens, with the trainer's own parts."""
    resident = _resident_peak()
    step = BareStep(cfg)
    parameters = list(step.model.parameters())
    with LiveBytes(parameters) as live:
        for number in range(2):
            live.peak = 0
            micro_batches = [step.random_batch() for _ in range(2)]
            totals = step.count(micro_batches)
            for index, batch in enumerate(micro_batches):
                step.model.set_requires_all_reduce(index == 1)  # type: ignore[operator]
                step.backward(batch, totals)
            if number == 0:
                step.optimizer.step()
                step.optimizer.zero_grad()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    moments = [value for state in step.optimizer.state.values() for value in state.values() if value.ndim]
    return Measured(
        held_bytes(parameters),
        held_bytes(gradients),
        held_bytes(moments),
        live.peak,
        _resident_peak() - resident,
    )


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def example(
    strategy: Strategy, expert_parallel: int, precision: Precision, mode: ActivationCheckpointing
) -> TrainConfig:
    """2.3M parameters, half of them experts', on 2 x 128 tokens at a time: bf16 is slow on a CPU."""
    model = ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
    )
    trainer = TrainerConfig(
        max_steps=1,
        micro_batch_size=2,
        precision=precision,
        activation_checkpointing=mode,
    )
    data = DataConfig(dir="none", sequence_length=128)
    parallel = ParallelConfig(strategy=strategy, expert_parallel_size=expert_parallel)
    return TrainConfig(model=model, trainer=trainer, parallel=parallel, data=data)


def predict(cfg: TrainConfig, gpus: int) -> RankMemory:
    """What `olmoe plan` says of the same configuration, routed evenly."""
    plan = PlanConfig(model=cfg.model, data=cfg.data, trainer=cfg.trainer, parallel=cfg.parallel, gpus=gpus)
    return rank_memory(olmoe_config(cfg.model), plan_layout(plan), plan_micro_batch(plan))


def report(cfg: TrainConfig, ranks: int) -> str:
    """One line: MiB measured on the first rank (predicted / measured)."""
    measured = run_ranks(ranks, measure, cfg)[0]  # new processes: a resident peak never comes down
    planned = predict(cfg, ranks)
    pairs = (
        (measured.parameters, planned.parameters),
        (measured.gradients, planned.gradients),
        (measured.optimizer, planned.optimizer),
        (measured.peak, planned.total),
    )
    cells = "".join(f"{real / MIB:9.1f} ({plan / real:4.2f})" for real, plan in pairs)
    parallel, trainer = cfg.parallel, cfg.trainer
    name = (
        f"{parallel.strategy.value} EP{parallel.expert_parallel_size} {trainer.precision.value} "
        f"{trainer.activation_checkpointing.value}"
    )
    return f"{name:<24}{cells}{measured.resident_growth / MIB:17.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    print(f"torch {torch.__version__}, {ranks} gloo ranks, one thread each; MiB (predicted / measured)")
    columns = "".join(f"{name:>16}" for name in ("parameters", "gradients", "optimizer", "peak"))
    print(f"{'':<24}{columns}{'resident growth':>17}")
    for strategy in (Strategy.fsdp, Strategy.ddp):
        for expert_parallel in (1, ranks):
            for precision in Precision:
                for mode in ActivationCheckpointing:
                    cfg = example(strategy, expert_parallel, precision, mode)
                    print(report(cfg, ranks), flush=True)


if __name__ == "__main__":
    main()
