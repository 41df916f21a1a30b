"""trainer.compile under expert parallelism and recomputation: the same gradients as without it."""

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

from olmoe_train.config.train import ParallelConfig
from tests.support.ranks import run_ranks
from tests.support.tiny import LENGTH, backward, build, global_batch, train_step, whole_gradients

# Two layers share one compilation; one more would only take longer.
SIZES: dict[str, Any] = {"num_hidden_layers": 2}


def two_passes(checkpointing: str, documents: bool, compiled: bool) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, summed gradients) of two batches, whose rows go to other ranks in other numbers.

    documents: several in a sequence, more in the first batch, each by itself.
    """
    parallel = ParallelConfig(expert_parallel_size=2)
    model, _ = build(parallel, checkpointing, compiled=compiled, **SIZES)
    losses = []
    for i in range(2):
        ids_BS = global_batch(i).chunk(2)[dist.get_rank()]
        tokens = ids_BS.numel()
        starts = {*range(0, tokens, LENGTH), *range(0, tokens, 5 + i)}
        offsets = torch.tensor([*sorted(starts), tokens], dtype=torch.int32) if documents else None
        losses.append(backward(model, ids_BS, offsets))
    return losses, whole_gradients(model)


def compare_with_eager() -> None:
    compilations = torch._dynamo.utils.counters["stats"]
    for checkpointing, documents in (("selective", False), ("full", False), ("selective", True)):
        losses, gradients = two_passes(checkpointing, documents, compiled=False)
        before = compilations["unique_graphs"]
        compiled_losses, compiled_gradients = two_passes(checkpointing, documents, compiled=True)
        # Norm and attention, at the least; norms do not know of documents, and are compiled by then.
        assert compilations["unique_graphs"] >= before + (1 if documents else 2)
        assert compiled_losses == pytest.approx(losses, rel=1e-6)
        for name, gradient in gradients.items():
            error = (compiled_gradients[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, (checkpointing, documents, name, error.item())


def test_compiled_gradients_are_the_same() -> None:
    run_ranks(2, compare_with_eager, timeout=600)


def compilations_by_step(precision: str) -> list[int]:
    """How many graphs had been compiled after each of six steps, whose routing differs."""
    model, optimizer = build(
        ParallelConfig(expert_parallel_size=2), precision=precision, compiled=True, **SIZES
    )
    counts = []
    for step in range(6):
        train_step(model, optimizer, step)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return counts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_compiled_after_the_third_step(precision: str) -> None:
    for counts in run_ranks(2, compilations_by_step, precision, timeout=600):
        assert counts[0] > 2
        assert counts[5] == counts[2], counts
