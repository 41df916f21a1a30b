"""The slow oracle against numbers worked by hand, and the fast block against the oracle."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from olmoe_train.model import OlmoeConfig
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from tests.support.moe_by_definition import moe_block


def test_one_token_by_hand() -> None:
    x_TD = torch.tensor([[2.0]])
    # Logits 2 ln 1, 2 ln 2, 2 ln 3: probabilities 1/14, 4/14, 9/14.
    router_ED = torch.tensor([[1.0], [2.0], [3.0]]).log()
    # gate 2 w and up 2 give relu(2 w) * 2, twice over the width of 1, times down.
    gate_EFD = torch.tensor([[[1.0]], [[3.0]], [[-1.0]]])
    up_EFD = torch.ones(3, 1, 1)
    down_EDF = torch.tensor([[[10.0]], [[0.5]], [[100.0]]])
    # Experts give 2 * 2 * 10 = 40, 6 * 2 * 0.5 = 6 and relu(-2) = 0.
    arguments = (x_TD, router_ED, gate_EFD, up_EFD, down_EDF)
    output, logits, chosen = moe_block(*arguments, top_k=2, hidden_act="relu")
    assert chosen.tolist() == [[2, 1]]
    assert logits.tolist() == [pytest.approx([0, 2 * math.log(2), 2 * math.log(3)])]
    assert output.item() == pytest.approx(4 / 14 * 6)
    assert moe_block(*arguments, 2, True, "relu")[0].item() == pytest.approx(4 / 13 * 6)
    assert moe_block(*arguments, 3, False, "relu")[0].item() == pytest.approx(4 / 14 * 6 + 1 / 14 * 40)


CASES: list[dict[str, Any]] = [
    {},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 5},
    {"norm_topk_prob": True},
    {"hidden_act": "gelu"},
    {"num_experts": 40},  # most experts without a token
]


@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_the_block_is_the_reference(changes: dict[str, Any], backend: str, tokens: int) -> None:
    """Output, routing and the gradient of every input, in float32."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8, "num_experts": 5}
    config = OlmoeConfig(**{**sizes, "num_experts_per_tok": 2, **changes})
    generator = torch.Generator().manual_seed(0)
    block = OlmoeSparseMoeBlock(config)
    block.experts.backend = backend
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    x_TD = torch.randn(tokens, 16, generator=generator, requires_grad=True)
    into_TD = torch.randn(tokens, 16, generator=generator)

    output_BSD, stats, logits = block(x_TD[None], output_router_stats=True, output_router_logits=True)
    chosen = block.gate(x_TD)[-1]
    inputs: dict[str, Tensor] = {"x": x_TD, **dict(block.named_parameters())}
    got = torch.autograd.grad(
        (output_BSD[0] * into_TD).sum() + 0.1 * logits.square().sum(), list(inputs.values())
    )

    gate_EFD, up_EFD = block.experts.gate_up_proj.chunk(2, dim=1)
    output_TD, expected_logits, expected_chosen = moe_block(
        x_TD,
        block.gate.weight,
        gate_EFD,
        up_EFD,
        block.experts.down_proj,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        config.hidden_act,
    )
    loss = (output_TD * into_TD).sum() + 0.1 * expected_logits.square().sum()
    expected = torch.autograd.grad(loss, list(inputs.values()))

    torch.testing.assert_close(output_BSD[0], output_TD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(chosen, expected_chosen)
    assert (
        stats.counts_LE[0].tolist()
        == expected_chosen.flatten().bincount(minlength=block.num_experts).tolist()
    )
    torch.testing.assert_close(stats.squared_logsumexp_L[0], expected_logits.logsumexp(-1).square().sum())
    for name, mine, other in zip(inputs, got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))
