"""trainer.compile under expert parallelism and recomputation: the same step as without it."""

import pytest
import torch._dynamo
from torch import Tensor

from olmoe_train.config import ParallelConfig
from tests.distributed.tiny import build, train_step, whole
from tests.spawn import run_ranks

# Two layers share one compilation; one more would only take longer.
SIZES = {"num_hidden_layers": 2}


def two_steps(checkpointing: str, compiled: bool) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, weights)."""
    parallel = ParallelConfig(expert_parallel_size=2)
    model, optimizer = build(parallel, checkpointing, compiled=compiled, **SIZES)
    losses = [train_step(model, optimizer, step) for step in range(2)]
    return losses, {name: whole(parameter) for name, parameter in model.named_parameters()}


def compare_with_eager() -> None:
    compilations = torch._dynamo.utils.counters["stats"]
    for checkpointing in ("selective", "full"):
        losses, weights = two_steps(checkpointing, compiled=False)
        before = compilations["unique_graphs"]
        compiled_losses, compiled_weights = two_steps(checkpointing, compiled=True)
        assert compilations["unique_graphs"] >= before + 2  # norm and attention, at the least
        assert compiled_losses == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            assert (compiled_weights[name] - weight).norm() < 1e-4 * weight.norm(), (checkpointing, name)


def test_a_compiled_step_is_the_same() -> None:
    run_ranks(2, compare_with_eager, timeout=600)
