"""What the layouts leave alone: fp32 routers in bf16, tied embeddings, and the sum of gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from olmoe_train.config.choices import Strategy
from olmoe_train.config.train import ParallelConfig
from tests.support.ranks import run_ranks
from tests.support.tiny import backward, build, global_batch, whole_gradients

EXPERTS = ParallelConfig(expert_parallel_size=2)
DDP = ParallelConfig(strategy=Strategy.ddp)


def dtypes_in_forward(parallel: ParallelConfig) -> tuple[set[str], bool]:
    """What a rank computes in, and whether the router's gradient has more digits than bf16 holds."""
    model, _ = build(parallel, precision="bf16")
    layer = model.decoder_layers[0]
    seen: set[str] = set()

    def look(module: torch.nn.Module, inputs: object, output: tuple[Tensor, ...]) -> None:
        seen.update(
            {f"router {module.weight.dtype}", f"q_proj {layer.self_attn.q_proj.weight.dtype}"},
            {f"logits {output[0].dtype}"},
        )

    layer.mlp.gate.register_forward_hook(look)
    backward(model, global_batch(0).chunk(dist.get_world_size())[dist.get_rank()])
    gradient = whole_gradients(model)["model.layers.0.mlp.gate.weight"]
    return seen, not torch.equal(gradient.bfloat16().float(), gradient)


@pytest.mark.parametrize("parallel", [EXPERTS, DDP], ids=["experts", "ddp"])
def test_routers_stay_in_fp32_where_the_rest_is_bf16(parallel: ParallelConfig) -> None:
    for seen, full_precision in run_ranks(2, dtypes_in_forward, parallel):
        assert seen == {"router torch.float32", "q_proj torch.bfloat16", "logits torch.float32"}
        assert full_precision


def tied_gradients(parallel: ParallelConfig) -> dict[str, Tensor]:
    model, _ = build(parallel, tie_word_embeddings=True)
    backward(model, global_batch(0).chunk(dist.get_world_size())[dist.get_rank()])
    assert isinstance(model, FSDPModule)
    model.reshard()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return whole_gradients(model)


@pytest.mark.parametrize("parallel", [EXPERTS, DDP], ids=["experts", "ddp"])
def test_tied_embeddings_stay_tied(parallel: ParallelConfig) -> None:
    expected = run_ranks(1, tied_gradients, ParallelConfig())[0]
    found = run_ranks(2, tied_gradients, parallel)[0]
    assert "lm_head.weight" not in expected
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def summed(parallel: ParallelConfig, passes: int) -> dict[str, Tensor]:
    """Gradients of the same batch on every rank, `passes` times over."""
    model, _ = build(parallel)
    assert isinstance(model, FSDPModule)
    for index in range(passes):
        model.set_requires_all_reduce(index == passes - 1)
        backward(model, global_batch(0))
    return whole_gradients(model)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), DDP, ParallelConfig(replicate_size=2), EXPERTS],
    ids=["fsdp", "ddp", "hsdp", "experts"],
)
def test_gradients_are_added_up_and_never_averaged(parallel: ParallelConfig) -> None:
    once, found = run_ranks(1, summed, ParallelConfig(), 1)[0], run_ranks(4, summed, parallel, 2)[0]
    for name, gradient in once.items():
        torch.testing.assert_close(found[name], 4 * 2 * gradient, rtol=1e-5, atol=1e-7, msg=name)


FEW: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1}


def few_experts(parallel: ParallelConfig) -> tuple[str, tuple[int, ...], dict[str, Tensor]]:
    """How two experts lie on the ranks, and the gradients of the global batch."""
    model, _ = build(parallel, **FEW)
    backward(model, global_batch(0).chunk(dist.get_world_size())[dist.get_rank()])
    gate_up = model.decoder_layers[0].mlp.experts.gate_up_proj
    assert isinstance(gate_up, DTensor)
    gradients = whole_gradients(model)
    return str(gate_up.placements), tuple(gate_up.to_local().shape), gradients


def test_experts_that_ranks_do_not_divide_are_cut_inside() -> None:
    """Two experts on four ranks: a half of each, not one of them and padding."""
    expected = run_ranks(1, few_experts, ParallelConfig())[0][2]
    for placements, shape, found in run_ranks(4, few_experts, ParallelConfig()):
        assert (placements, shape) == ("(Shard(dim=1),)", (2, 8, 32))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
