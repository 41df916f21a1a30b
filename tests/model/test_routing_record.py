"""Routing that is recorded in one pass and replayed in another."""

from typing import Any

import pytest
import torch
from torch import Tensor

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.moe.routing_record import OWN_CHOICE, record_routing, replay_routing
from tests.support.sizes import SIZES


def model_and_ids(**changes: Any) -> tuple[OlmoeForCausalLM, Tensor]:
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"initializer_range": 0.3} | changes)).eval()
    return model, torch.randint(2, SIZES["vocab_size"], (2, 9))


def recorded(model: OlmoeForCausalLM, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(Logits, record [L, T, K]) of one pass."""
    with torch.no_grad(), record_routing(model) as passes_L:
        logits = model(ids_BS).logits
    return logits, torch.stack([indices_TK for (indices_TK,) in passes_L])


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_ones_own_record_gives_the_same_logits_bit_for_bit(backend: str) -> None:
    model, ids_BS = model_and_ids()
    model.set_experts_backend(backend)
    logits, record = recorded(model, ids_BS)
    with torch.no_grad(), replay_routing(model, record) as agreements:
        assert torch.equal(model(ids_BS).logits, logits)
    same, all_choices = torch.stack(agreements).sum(0).tolist()
    assert same == all_choices == record.numel()
    router = model.decoder_layers[0].mlp.gate
    assert router.select_experts.__name__ == "choose_top_k", "the block leaves nothing behind"


@pytest.mark.parametrize("normalized", [False, True])
def test_a_foreign_record_changes_only_the_choice(normalized: bool) -> None:
    """With the record's experts, the weights are still the router's probabilities of them."""
    model, ids_BS = model_and_ids(num_hidden_layers=1, norm_topk_prob=normalized)
    _, record = recorded(model, ids_BS)
    foreign = (record + 1) % SIZES["num_experts"]
    block = model.decoder_layers[0].mlp
    x_BSD = torch.randn(2, 9, SIZES["hidden_size"])
    with torch.no_grad():
        with replay_routing(model, foreign):
            out_BSD = block(x_BSD)[0]
            probs_TE, weights_TK, indices_TK = block.gate(x_BSD.flatten(0, 1))[1:]
        own_TE = block.gate(x_BSD.flatten(0, 1))[1]
    assert torch.equal(indices_TK, foreign[0])
    assert torch.equal(probs_TE, own_TE)
    expected_TK = own_TE.gather(1, foreign[0])
    assert torch.equal(weights_TK, expected_TK / (expected_TK.sum(-1, keepdim=True) if normalized else 1))
    by_hand = torch.zeros(18, SIZES["hidden_size"])
    for token, x_D in enumerate(x_BSD.flatten(0, 1)):
        for weight, expert in zip(weights_TK[token], foreign[0, token], strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ x_D).chunk(2)
            by_hand[token] += weight * (
                block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            )
    assert (out_BSD.flatten(0, 1) - by_hand).abs().max() < 1e-5


def test_tokens_without_a_record_choose_themselves() -> None:
    model, ids_BS = model_and_ids()
    logits, record = recorded(model, ids_BS)
    foreign = torch.full_like(record, OWN_CHOICE)
    with torch.no_grad(), replay_routing(model, foreign) as agreements:
        assert torch.equal(model(ids_BS).logits, logits)
    assert torch.stack(agreements)[:, 1].sum() == 0
    foreign = (record + 1) % SIZES["num_experts"]
    with torch.no_grad(), replay_routing(model, foreign, replay=False) as agreements:
        assert torch.equal(model(ids_BS).logits, logits), "only compared"
    same, all_choices = torch.stack(agreements).sum(0).tolist()
    assert same < all_choices
