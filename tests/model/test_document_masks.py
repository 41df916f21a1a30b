"""data.mask_documents: a document in a packed batch is computed as if it were alone."""

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM, attention, transformer
from olmoe_train.model.attention import documents_and_positions
from olmoe_train.model.losses import router_losses_from_stats
from olmoe_train.model.moe.router_stats import RouterStats
from tests.support.sizes import SIZES
from tests.support.tiny import whole_gradients

# Two rows of 12: documents of 5, 1, 6 and 3, 7; and padding of 2.
ROWS = [[5, 1, 6], [3, 7, 2]]
LENGTH, PADDING = 12, 2
OFFSETS = torch.tensor([0, 5, 6, 12, 15, 22, 24], dtype=torch.int32)
PARTS = [slice(a, b) for a, b in pairwise(OFFSETS.tolist())][:-1]  # without the padding


def make(**options: Any) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**SIZES | {"initializer_range": 0.3} | options))


IDS = torch.randint(2, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, LENGTH, dtype=torch.long)
MASK[1, -PADDING:] = 0
LABELS = IDS.flatten().clone()
LABELS[OFFSETS[:-1].long()] = -100
LABELS = LABELS.view(2, LENGTH).masked_fill(MASK == 0, -100)


def packed(model: OlmoeForCausalLM) -> tuple[Tensor, list[Tensor]]:
    """(logits [B * S, V], router logits [B * S, E] of each layer)."""
    output = model.model.run_layers(IDS, MASK, document_offsets=OFFSETS, output_router_logits=True)
    assert output.router_logits is not None
    return model.lm_head(output.last_hidden_state).flatten(0, 1), list(output.router_logits)


def alone(model: OlmoeForCausalLM) -> list[tuple[Tensor, list[Tensor]]]:
    """The same of each document as the only sequence of the batch."""
    found = []
    for part in PARTS:
        output = model(IDS.flatten()[part][None], output_router_logits=True)
        found.append((output.logits[0], list(output.router_logits)))
    return found


def test_document_and_position_of_each_token() -> None:
    documents, positions = documents_and_positions(OFFSETS, 2, LENGTH)
    assert documents.tolist() == [[0] * 5 + [1] + [2] * 6, [3] * 3 + [4] * 7 + [5] * 2]
    assert positions.tolist() == [[*range(5), 0, *range(6)], [*range(3), *range(7), 0, 1]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
    ids=["plain", "grouped", "dynamic"],
)
def test_logits_are_those_of_the_document_alone(options: dict[str, Any]) -> None:
    model = make(**options)
    logits, router = packed(model)
    for part, (expected, expected_router) in zip(PARTS, alone(model), strict=True):
        torch.testing.assert_close(logits[part], expected, rtol=1e-5, atol=1e-5)
        for layer, layer_expected in zip(router, expected_router, strict=True):
            torch.testing.assert_close(layer[part], layer_expected, rtol=1e-5, atol=1e-5)
    together = model(IDS).logits.flatten(0, 1)
    assert (together[PARTS[2]] - logits[PARTS[2]]).abs().max() > 1e-2  # without the masks it is another


def test_losses_and_gradients_are_those_of_the_documents_alone() -> None:
    """Summed cross-entropy, and router losses over the same tokens."""
    model = make()
    output = model.training_forward(IDS, LABELS, MASK, document_offsets=OFFSETS)
    balance, z = router_losses_from_stats(output.router, top_k=2)
    (output.ce_sum + balance + z).backward()
    gradients = whole_gradients(model)
    model.zero_grad()

    ce_sum, router = torch.zeros(()), []
    for part in PARTS:
        ids = IDS.flatten()[part][None]
        one = model.training_forward(ids, ids)
        ce_sum = ce_sum + one.ce_sum
        router.append(one.router)
    columns = zip(*(stats[:4] for stats in router), strict=True)
    added = RouterStats(*(torch.stack(sums).sum(0) for sums in columns))
    expected_balance, expected_z = router_losses_from_stats(added, top_k=2)
    (ce_sum + expected_balance + expected_z).backward()
    for found, expected in ((output.ce_sum, ce_sum), (balance, expected_balance), (z, expected_z)):
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_kernel_is_for_half_precision_on_gpus_without_dropout() -> None:
    assert not attention.has_document_kernel(torch.zeros(1, dtype=torch.bfloat16), 0.0)  # on the CPU


@pytest.mark.parametrize("heads", [4, 2])
def test_what_the_kernel_is_asked_for(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    """There is none for the CPU: the same question is answered by attention over each document."""
    signature = inspect.signature(varlen.varlen_attn)

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        asked = signature.bind(*args, **kwargs).arguments
        assert asked["window_size"] == (-1, 0)  # causal
        assert asked["max_q"] == asked["max_k"] == LENGTH  # no document is longer
        assert asked["cu_seq_q"] is asked["cu_seq_k"]
        offsets = asked["cu_seq_q"].tolist()
        assert offsets == OFFSETS.tolist()
        assert asked["query"].shape == asked["key"].shape == asked["value"].shape == (2 * LENGTH, 4, 8)
        parts = []
        for start, stop in pairwise(offsets):
            q, k, v = (asked[name][start:stop].transpose(0, 1) for name in ("query", "key", "value"))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
        return torch.cat(parts)

    model = make(num_key_value_heads=heads)
    expected, expected_router = packed(model)
    monkeypatch.setattr(varlen, "varlen_attn", answer)
    monkeypatch.setattr(transformer, "has_document_kernel", lambda x, dropout: True)
    logits, router = packed(model)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(router, expected_router, rtol=1e-5, atol=1e-5)
