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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olmoe_train.config.choices import ActivationCheckpointing, Precision, Strategy
from olmoe_train.config.data import DataConfig
from olmoe_train.config.model import ModelConfig, olmoe_config
from olmoe_train.config.train import ParallelConfig, TrainConfig, TrainerConfig
from olmoe_train.distributed.mesh import build_mesh, init_distributed, local_tensor
from olmoe_train.optim.build import build_optimizer
from olmoe_train.planning.layout import ParallelLayout
from olmoe_train.planning.memory import MicroBatch, RankMemory, rank_memory
from olmoe_train.training.batch import count_tokens
from olmoe_train.training.build import build_model, build_objective
from tests.support.ranks import run_ranks

MIB = 2**20


class LiveBytes(TorchDispatchMode):
    """Watches every operator, backward's too, and remembers the most bytes that storages held at once."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        """tensors: alive already, to be counted too."""
        super().__init__()
        self.storages: WeakSet[Any] = WeakSet()
        self.peak = 0
        self.watch(tensors)

    def watch(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.storages.add(local_tensor(value).untyped_storage())

    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.watch(result)
        self.peak = max(self.peak, self.now())
        return result


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    resident_growth: int


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    storages = {local_tensor(tensor).untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages)


def measure(cfg: TrainConfig) -> Measured:
    """Two optimizer steps of two micro-batches of random tokens, with the trainer's own parts."""
    device = init_distributed("cpu")
    resident = _resident_peak()
    mesh = build_mesh(cfg.parallel, device)
    model = build_model(cfg, mesh)
    optimizer = build_optimizer(model.parameters(), cfg.optimizer)
    objective = build_objective(cfg, model, device)
    live = LiveBytes(list(model.parameters()))
    shape = (cfg.trainer.micro_batch_size, cfg.data.sequence_length)
    with live:
        for step in range(2):
            live.peak = 0
            micro_batches = []
            for _ in range(2):
                ids = torch.randint(cfg.model.vocab_size, shape)
                micro_batches.append({"input_ids": ids, "targets": ids.roll(-1, 1)})
            totals = count_tokens(micro_batches, False, device)
            for index, batch in enumerate(micro_batches):
                model.set_requires_all_reduce(index == 1)  # type: ignore[operator]
                objective(model, batch, totals)[0].backward()
            if step == 0:
                optimizer.step()
                optimizer.zero_grad()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return Measured(
        held_bytes(model.parameters()),
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
    parallel, trainer = cfg.parallel, cfg.trainer
    layout = ParallelLayout(
        parallel.strategy,
        gpus,
        parallel.expert_parallel_size,
        parallel.replicate_size,
        reshard_after_forward=parallel.reshard_after_forward,
        prefetch=parallel.prefetch,
    )
    batch = MicroBatch(
        trainer.micro_batch_size,
        cfg.data.sequence_length,
        trainer.precision,
        trainer.activation_checkpointing,
    )
    return rank_memory(olmoe_config(cfg.model), layout, batch)


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
