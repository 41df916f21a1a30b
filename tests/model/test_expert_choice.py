"""Expert choice against numbers worked by hand, a slow loop and finite differences; cuts and padding."""

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from olmoe_train.config.choices import ActivationCheckpointing
from olmoe_train.distributed.activation_checkpointing import checkpoint_activations
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.moe.expert_choice import ExpertChoiceBlock
from olmoe_train.utils.errors import UserError
from tests.support.sizes import SIZES

# 5 tokens for each of 3 experts is no whole number: 13 x 1.3 / 3 = 5.6.
CONFIG = OlmoeConfig(
    hidden_size=8,
    num_attention_heads=2,
    intermediate_size=6,
    num_experts=3,
    num_experts_per_tok=2,
    routing="expert_choice",
    expert_capacity=1.3,
)


def random_block(config: OlmoeConfig = CONFIG) -> ExpertChoiceBlock:
    block = ExpertChoiceBlock(config).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return block


def by_definition(block: ExpertChoiceBlock, x_SD: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """One sequence, one expert and one token at a time: output [S, D], and tokens per expert [E]."""
    probs_SE = (x_SD.float() @ block.gate.weight.float().T).softmax(-1)
    # Of nearly equal tokens the earlier one is taken.
    factor_S = 1 - 0.01 * torch.arange(len(x_SD)) / len(x_SD)
    out_SD, counts_E = torch.zeros_like(x_SD), torch.zeros(block.num_experts)
    for expert in range(block.num_experts):
        gate_FD, up_FD = block.experts.gate_up_proj[expert].chunk(2)
        order = sorted(range(len(x_SD)), key=lambda token: -(factor_S * probs_SE[:, expert])[token].item())
        for token in order[:capacity]:
            inner_F = torch.nn.functional.silu(gate_FD @ x_SD[token]) * (up_FD @ x_SD[token])
            one_SD = torch.zeros_like(x_SD)
            one_SD[token] = probs_SE[token, expert] * (block.experts.down_proj[expert] @ inner_F)
            out_SD, counts_E[expert] = out_SD + one_SD, counts_E[expert] + 1
    return out_SD, counts_E


def test_who_takes_whom_by_hand() -> None:
    """Two experts take one of two tokens each: 2 x 1 / 2. Their probabilities are 9/10 and 1/10 for token 0,
    and 3/4 and 1/4 for token 1. Both tokens would choose expert 0."""
    sizes = {"hidden_size": 8, "num_experts": 2, "num_experts_per_tok": 1, "routing": "expert_choice"}
    block = ExpertChoiceBlock(OlmoeConfig(**SIZES | sizes))
    logits_TE = torch.tensor([[0.9, 0.1], [0.75, 0.25]]).log()
    with torch.no_grad():
        block.gate.weight.copy_(torch.zeros(2, 8).index_copy_(1, torch.tensor([0, 1]), logits_TE.T))
    _, _, weights_BCE, positions_BCE = block.gate(torch.eye(2, 8))
    assert positions_BCE.tolist() == [[[0, 1]]]
    assert weights_BCE[0, 0].tolist() == pytest.approx([0.9, 0.25])


def test_the_block_is_the_definition() -> None:
    """Output, counts and every gradient, of two sequences, the first of which has two tokens of padding."""
    block = random_block()
    x_BSD = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    into_BSD = torch.randn(2, 13, 8, dtype=torch.float64)
    mask_BS = torch.ones(2, 13)
    mask_BS[0, :2] = 0
    output_BSD, stats, _ = block(x_BSD, mask_BS.flatten(), output_router_stats=True)
    # 11 x 1.3 / 3 = 4.8 and 13 x 1.3 / 3 = 5.6.
    parts = [by_definition(block, x_BSD[0, 2:], 4), by_definition(block, x_BSD[1], 5)]
    expected_BSD = torch.stack([torch.nn.functional.pad(parts[0][0], (0, 0, 2, 0)), parts[1][0]])
    torch.testing.assert_close(output_BSD, expected_BSD, rtol=1e-6, atol=1e-6)
    assert stats is not None
    assert stats.counts_LE.tolist() == [[9, 9, 9]]

    inputs = {"x": x_BSD, **dict(block.named_parameters())}
    found, expected = (
        torch.autograd.grad((out * into_BSD).sum(), list(inputs.values()), retain_graph=True)
        for out in (output_BSD, expected_BSD)
    )
    for name, mine, other in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=partial("{}: {}".format, name))


def test_gradients_are_finite_differences() -> None:
    """In fp64, with the choice held: the block routes in fp32, whose rounding differences would see."""
    block = random_block()
    held = block.gate(torch.randn(10, 8, dtype=torch.float64), 2)[-1]
    block.gate.select_experts = lambda scores, tokens: held
    block.gate.probabilities = lambda x_TD: (  # type: ignore[method-assign]
        x_TD @ block.gate.weight.T,
        (x_TD @ block.gate.weight.T).softmax(-1),
    )
    x_BSD = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)

    def output(x_BSD: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        values = {"gate.weight": router, "experts.gate_up_proj": up, "experts.down_proj": down}
        out_BSD: Tensor = torch.func.functional_call(block, values, (x_BSD,))[0]
        return out_BSD

    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    assert torch.autograd.gradcheck(output, (x_BSD, *weights), fast_mode=True)


def tiny(**changes: object) -> OlmoeForCausalLM:
    return OlmoeForCausalLM(OlmoeConfig(**SIZES | {"routing": "expert_choice"} | changes)).double()


def test_a_sequence_is_the_same_in_every_batch() -> None:
    """Alone, beside others, and with padding before or after it."""
    model, ids = tiny(), torch.randint(2, 90, (3, 16))
    # Equal tokens at the beginning have equal scores, up to rounding.
    ids[1, :6] = 5
    together = model(ids).logits[1]
    torch.testing.assert_close(model(ids[1:2]).logits[0], together, rtol=1e-6, atol=1e-6)
    for before, after in ((7, 0), (0, 7)):
        padded = torch.nn.functional.pad(ids[1:2], (before, after), value=1)
        mask = torch.nn.functional.pad(torch.ones(1, 16, dtype=torch.long), (before, after))
        positions = (torch.arange(16 + before + after) - before).clamp(min=0)[None]
        found = model(padded, attention_mask=mask, position_ids=positions).logits[0, before : before + 16]
        torch.testing.assert_close(found, together, rtol=1e-6, atol=1e-6)


def test_recomputation_keeps_the_choice() -> None:
    """Even where a second choice would be another one: each layer's experts choose once, at random."""
    model, ids, gradients = tiny(), torch.randint(2, 90, (2, 16)), []
    for mode in (ActivationCheckpointing.none, ActivationCheckpointing.full):
        calls = itertools.count()

        def choose(scores_BSE: Tensor, tokens: int, calls: Iterator[int] = calls) -> Tensor:
            generator = torch.Generator().manual_seed(next(calls))
            return torch.rand(scores_BSE.shape, generator=generator).topk(tokens, dim=1).indices

        for layer in model.decoder_layers:
            layer.mlp.gate.select_experts = choose
        checkpoint_activations(model, mode)
        loss = model.training_forward(ids, ids).ce_sum
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        assert next(calls) == 3
    torch.testing.assert_close(*gradients)


def test_it_looks_ahead_and_refuses_to_generate() -> None:
    model, ids = tiny(), torch.randint(2, 90, (1, 16))
    other = ids.clone()
    other[0, 8:] = torch.randint(2, 90, (8,))
    assert not torch.allclose(model(ids).logits[0, :8], model(other).logits[0, :8])
    with pytest.raises(UserError, match=r"model\.routing=expert_choice: the model cannot generate"):
        model.generate(ids, max_new_tokens=1)
    with pytest.raises(UserError, match="cannot generate"):
        model(ids[:, :1], past_key_values=model(ids, use_cache=True).past_key_values)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"expert_capacity": 9.0}, "expert_capacity=9.0 is more than num_experts=8"),
        ({"norm_topk_prob": True}, "norm_topk_prob=true has no meaning with routing=expert_choice"),
        ({"num_experts": 1, "num_experts_per_tok": 1}, "num_experts=1 is a dense model"),
        ({"routing": "token_choice", "expert_capacity": 1.0}, "has no meaning with routing=token_choice"),
        ({"routing": "both"}, "routing='both' is unknown; choose from token_choice, expert_choice"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tiny(**changes)
