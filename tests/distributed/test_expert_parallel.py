"""Dispatch and combine over ranks against the local pair: same result, same gradients, however uneven."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from olmoe_train.config.choices import Strategy
from olmoe_train.config.train import ParallelConfig
from olmoe_train.distributed import expert_parallel
from olmoe_train.model import OlmoeConfig
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock, combine_local, dispatch_local
from olmoe_train.model.moe.experts import OlmoeExperts
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES
from tests.support.tiny import build, global_batch

EXPERTS, HIDDEN = 8, 32

# Expert indices [T, K] of each of four ranks; rank r holds experts 2 r and 2 r + 1.
ROUTINGS = {
    "everything goes to one rank": [[[4, 5], [5, 4]]] * 4,
    "everything goes to one expert": [[[3], [3], [3]]] * 4,
    "everyone keeps its own": [[[2 * rank, 2 * rank + 1]] * 3 for rank in range(4)],
    "ranks differ in tokens": [[[0, 7]], [[1, 2]] * 5, [[7, 6], [0, 3]], [[5, 0]] * 17],
    "one rank gets all but a row": [[[0, 1]] * 4, [[1, 0]] * 3, [[0, 1]], [[1, 6]]],
    "in no order": [[[6, 1, 3], [0, 5, 2]], [[7, 4, 0]], [[2, 3, 1]] * 2, [[5, 6, 7], [4, 0, 1]]],
}


def experts_with_weights(dtype: torch.dtype) -> OlmoeExperts:
    """All experts, the same on every rank."""
    experts = OlmoeExperts(OlmoeConfig(**SIZES))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return experts.to(dtype)


def tokens(rank: int, indices: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rank's x_TD, weights_TK, indices_TK, and the gradient that comes back to its output."""
    generator = torch.Generator().manual_seed(100 + rank)
    indices_TK = torch.tensor(indices)
    x_TD, d_out_TD = (torch.randn(len(indices_TK), HIDDEN, generator=generator).to(dtype) for _ in range(2))
    weights_TK = torch.rand(indices_TK.shape, generator=generator)
    return x_TD.requires_grad_(), weights_TK.requires_grad_(), indices_TK, d_out_TD


def run(
    experts: OlmoeExperts,
    dispatch: Callable[..., Any],
    combine: Callable[..., Any],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> list[Tensor]:
    """(out, dx, dweights) of one rank's tokens; gradients of the experts' weights add up in place."""
    x_TD, weights_TK, indices_TK, d_out_TD = inputs
    x_ND, weights_NJ, routing = dispatch(x_TD, weights_TK, indices_TK, EXPERTS)
    out_TD = combine(experts(x_ND, weights_NJ, routing), weights_TK, routing)
    out_TD.backward(d_out_TD)
    return [out_TD.detach(), x_TD.grad, weights_TK.grad]


def compare_with_local(
    routings: dict[str, list[list[list[int]]]], dtype: torch.dtype, tolerance: float
) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    dispatch = partial(expert_parallel.dispatch, group=group)
    combine = partial(expert_parallel.combine, group=group)
    per_rank = EXPERTS // group.size()
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    for name, indices in routings.items():
        whole, part = experts_with_weights(dtype), experts_with_weights(dtype)
        part.local_experts = lambda weight: weight[mine]
        expected = [
            run(whole, dispatch_local, combine_local, tokens(r, indices[r], dtype))
            for r in range(group.size())
        ]
        found = run(part, dispatch, combine, tokens(rank, indices[rank], dtype))
        for value, reference in zip(found, expected[rank], strict=True):
            torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance, msg=name)
        # The local experts saw every rank's tokens one after the other, the parallel ones all at once.
        for value, reference in zip(part.parameters(), whole.parameters(), strict=True):
            assert value.grad is not None
            assert reference.grad is not None
            torch.testing.assert_close(
                value.grad[mine], reference.grad[mine], rtol=tolerance, atol=tolerance, msg=name
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_it_equals_the_local_pair(dtype: torch.dtype, tolerance: float) -> None:
    run_ranks(4, compare_with_local, ROUTINGS, dtype, tolerance)


def test_two_ranks_of_four_experts() -> None:
    run_ranks(2, compare_with_local, {name: r[2:] for name, r in ROUTINGS.items()}, torch.float32, 1e-5)


def test_without_expert_parallelism_nothing_is_sent() -> None:
    block = OlmoeSparseMoeBlock(OlmoeConfig(**SIZES))
    assert (block.dispatch, block.combine) == (dispatch_local, combine_local)


def count_all_to_alls(checkpointing: str) -> list[int]:
    """A step's all-to-alls in forward and backward, and how many of those are of counts, not of rows."""
    dtypes, real = [], dist.all_to_all_single

    def counting(output: Tensor, *args: Any) -> None:
        dtypes.append(output.dtype)
        real(output, *args)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    model, _ = build(ParallelConfig(expert_parallel_size=2), checkpointing)
    ids_BS = global_batch(0)
    output = model.training_forward(ids_BS, ids_BS)
    forward = dtypes.copy()
    output.ce_sum.backward()
    backward = dtypes[len(forward) :]
    return [len(forward), len(backward), forward.count(torch.int64), backward.count(torch.int64)]


@pytest.mark.parametrize(
    ("checkpointing", "backward_all_to_alls"),
    # Both gradients' way back; full sends rows once more each way. Sizes are asked for in forward alone.
    [("none", 2), ("selective", 2), ("full", 4)],
)
def test_what_a_layer_sends(checkpointing: str, backward_all_to_alls: int) -> None:
    layers = 3
    found = run_ranks(2, count_all_to_alls, checkpointing)[0]
    assert found == [3 * layers, backward_all_to_alls * layers, 1 * layers, 0]


def placements(parallel: ParallelConfig) -> tuple[str, tuple[int, ...], str]:
    model, _ = build(parallel)
    block = model.decoder_layers[0].mlp
    gate_up, router = block.experts.gate_up_proj, block.gate.weight
    assert gate_up.shape == (8, 32, 32)
    assert isinstance(gate_up, DTensor)
    assert isinstance(router, DTensor)
    return str(gate_up.placements), tuple(gate_up.to_local().shape), str(router.placements)


FSDP = ParallelConfig(expert_parallel_size=2)
HSDP = ParallelConfig(expert_parallel_size=2, replicate_size=2)
DDP = ParallelConfig(expert_parallel_size=2, strategy=Strategy.ddp)
ALL_EXPERT = ParallelConfig(expert_parallel_size=4)


@pytest.mark.parametrize(
    ("parallel", "experts", "shape", "rest"),
    [
        (FSDP, "(Shard(dim=1), Shard(dim=0))", (4, 16, 32), "(Shard(dim=0),)"),
        (HSDP, "(Replicate(), Shard(dim=1), Shard(dim=0))", (4, 32, 32), "(Replicate(), Shard(dim=0))"),
        (DDP, "(Replicate(), Shard(dim=1), Shard(dim=0))", (4, 32, 32), "(Replicate(), Shard(dim=0))"),
        (ALL_EXPERT, "(Shard(dim=1), Shard(dim=0))", (2, 32, 32), "(Shard(dim=0),)"),
    ],
    ids=["fsdp", "hsdp", "ddp", "all ranks"],
)
def test_experts_lie_on_a_mesh_of_their_own(
    parallel: ParallelConfig, experts: str, shape: tuple[int, ...], rest: str
) -> None:
    assert run_ranks(4, placements, parallel)[0] == (experts, shape, rest)
