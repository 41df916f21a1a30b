"""What scaled_dot_product_attention is handed: torch takes its flash kernel on CUDA for half precision, no
mask and rows without gaps, and a slower one otherwise. There is no GPU here, so the arguments are looked at.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from tests.support import sizes

SIZES = sizes.SIZES | {"num_hidden_layers": 2}  # each layer is a call

IDS = torch.arange(2, 26).view(2, 12)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every attention from here on."""
    real, found = F.scaled_dot_product_attention, []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        found.append({"qkv": (q, k, v), "mask": mask, **options})
        return real(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return found


def suits_flash(call: dict[str, Any]) -> bool:
    half = all(t.dtype == torch.bfloat16 for t in call["qkv"])
    return half and call["mask"] is None and all(t.stride(-1) == 1 for t in call["qkv"])


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_training_without_padding(key_value_heads: int, calls: list[dict[str, Any]]) -> None:
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES, num_key_value_heads=key_value_heads)).bfloat16()
    model.training_forward(IDS, IDS).ce_sum.backward()
    assert len(calls) == 2
    for call in calls:
        assert suits_flash(call)
        assert call["is_causal"]
        # Keys and values are not copied for every query head: the kernel does without.
        assert call["enable_gqa"] == (key_value_heads != 4)
        assert call["qkv"][1].shape[1] == key_value_heads


def test_decoding(calls: list[dict[str, Any]]) -> None:
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES)).bfloat16().eval()
    model.generate(IDS, max_new_tokens=3, eos_token_id=[])
    assert len(calls) == 3 * 2
    assert all(suits_flash(call) for call in calls)
    assert [call["is_causal"] for call in calls] == [True, True, False, False, False, False]
