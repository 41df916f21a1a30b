"""Activation checkpointing: gradients as without it, even where recomputation would route otherwise."""

import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from olmoe_train.config.train import ParallelConfig
from olmoe_train.model import OlmoeForCausalLM
from tests.support.ranks import run_ranks
from tests.support.tiny import backward, build, global_batch, whole_gradients

LAYOUTS = [(1, 1), (2, 2)]  # ranks, expert_parallel_size


def break_ties_anew_each_time(model: OlmoeForCausalLM) -> None:
    """Every router score tied, and a choice that depends on how often it was made before: what a kernel that
    sums in another order does to a near-tie, at its worst."""
    for index in range(len(model.model.layers)):
        gate = model.decoder_layers[index].mlp.gate
        gate.weight.data.zero_()
        calls = itertools.count()

        def choose(probs_TE: Tensor, top_k: int, calls: Any = calls) -> Tensor:
            assert (probs_TE == probs_TE[0, 0]).all()
            generator = torch.Generator().manual_seed(next(calls))
            return torch.rand(probs_TE.shape, generator=generator).topk(top_k, dim=-1).indices

        gate.select_experts = choose


def gradients(checkpointing: str, experts: int, ties: bool, **sizes: Any) -> dict[str, Tensor]:
    model, _ = build(ParallelConfig(expert_parallel_size=experts), checkpointing, **sizes)
    if ties:
        break_ties_anew_each_time(model)
    torch.manual_seed(5 + dist.get_rank())  # of dropout
    backward(model, global_batch(0).chunk(dist.get_world_size())[dist.get_rank()])
    return whole_gradients(model)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize(("ranks", "experts"), LAYOUTS)
@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_gradients_are_those_without_it(ranks: int, experts: int, checkpointing: str, ties: bool) -> None:
    expected = run_ranks(ranks, gradients, "none", experts, ties)[0]
    found = run_ranks(ranks, gradients, checkpointing, experts, ties)[0]
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-8, msg=name)


def dropped_out(checkpointing: str) -> dict[str, Tensor]:
    return gradients(checkpointing, 1, False, attention_dropout=0.3)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_the_same_attention_is_dropped_again(checkpointing: str) -> None:
    expected, found = (run_ranks(1, dropped_out, mode)[0] for mode in ("none", checkpointing))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-8, msg=name)


class Counter(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, int] = defaultdict(int)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[operator] += 1
        return operator(*args, **kwargs or {})


def matrix_products_and_norms(checkpointing: str) -> list[int]:
    """Matrix products in forward and backward, and norms in forward and backward."""
    model, _ = build(checkpointing=checkpointing)
    ids_BS = global_batch(0)
    with Counter() as forward:
        output = model.training_forward(ids_BS, ids_BS)
    with Counter() as back:
        output.ce_sum.backward()
    mm, rsqrt = torch.ops.aten.mm, torch.ops.aten.rsqrt.default
    counts = [c.calls[mm.default] + c.calls[mm.out] for c in (forward, back)]
    return [*counts, forward.calls[rsqrt], back.calls[rsqrt]]


def test_what_is_computed_again() -> None:
    none, selective, full = (
        run_ranks(1, matrix_products_and_norms, mode)[0] for mode in ("none", "selective", "full")
    )
    layers, in_a_layer = 3, 4 + 1 + 2 * 8  # attention, router, two an expert
    products, backward_products = none[:2]
    norms = 4 * layers + 1
    assert none == [products, backward_products, norms, 0]
    assert selective == [products, backward_products, norms, 4 * layers]
    assert full == [products, backward_products + in_a_layer * layers, norms, 4 * layers]
