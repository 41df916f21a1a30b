"""NF4 against the published levels, and a quantized model against one with the same rounded weights."""

import pytest
import torch

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import (
    add_adapter,
    quantize_base,
    quantized_weights,
)
from olmoe_train.model.adapters.nf4 import LEVELS, dequantize_nf4, quantize_nf4, round_trip_nf4
from olmoe_train.model.adapters.spec import ATTENTION, EXPERTS, AdapterSpec, is_adapter_parameter
from olmoe_train.planning.adapter import AdapterPlan, adapter_counts
from tests.support.sizes import SIZES

# QLoRA, arXiv 2305.14314, appendix E, as printed there.
PUBLISHED = """-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0"""


def test_values_are_the_published_levels_times_the_largest_of_each_block() -> None:
    levels = torch.tensor([float(text) for text in PUBLISHED.split(",")])
    assert tuple(levels.tolist()) == pytest.approx(LEVELS, abs=0)
    torch.manual_seed(0)
    weight_OI = torch.randn(6, 64) * torch.logspace(-3, 3, 6)[:, None]
    values = round_trip_nf4(weight_OI)
    absmax = weight_OI.abs().amax(1, keepdim=True)
    candidates = absmax[:, :, None] * levels  # [O, 1, 16]
    nearest = (weight_OI[:, :, None] - candidates).abs().argmin(-1)
    assert torch.equal(values, absmax * levels[nearest])
    assert torch.equal(values.abs().amax(1), absmax[:, 0])


def test_packing_by_hand() -> None:
    """A block of 64: 2, -2, then zeros. Levels 15 and 0 make 0xF0, and level 7 twice makes 0x77."""
    block = torch.zeros(1, 64)
    block[0, :2] = torch.tensor([2.0, -2.0])
    packed, absmax = quantize_nf4(block)
    assert packed.tolist() == [0xF0] + [0x77] * 31
    assert absmax.tolist() == [2.0]
    assert torch.equal(dequantize_nf4(packed, absmax).view(1, 64), block)
    assert not round_trip_nf4(torch.zeros(2, 64)).any()


@pytest.mark.parametrize("dora", [False, True])
def test_a_quantized_model_computes_with_the_rounded_weights(dora: bool) -> None:
    spec = AdapterSpec(rank=4, alpha=10.0, targets=(ATTENTION, EXPERTS), dora=dora)
    models = []
    for quantized in (False, True):
        torch.manual_seed(0)
        model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
        add_adapter(model, spec)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        if quantized:
            quantize_base(model)
            for name, weight in quantized_weights(model).items():
                weight.set_weight(weights[name])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_adapter_parameter(name):
                    parameter.normal_(1.0 if name.endswith("magnitude") else 0.0, 0.2)
                elif (".self_attn." in name and name.endswith("proj.weight")) or ".experts." in name:
                    parameter.copy_(round_trip_nf4(parameter))
        models.append(model)
    plain, packed = models
    assert len(quantized_weights(packed)) == 6 * SIZES["num_hidden_layers"]
    assert not any(name.endswith("gate_up_proj") for name, _ in packed.named_parameters())
    ids_BS = torch.randint(2, SIZES["vocab_size"], (2, 11))
    losses = [model.training_forward(ids_BS, labels=ids_BS).ce_sum for model in models]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for loss in losses:
        loss.backward()
    found = dict(packed.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            gradient = found[name].grad
            assert gradient is not None, name
            assert (gradient - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


def test_of_the_released_model_97_percent_are_in_4_bits() -> None:
    """Experts 16 x 64 x 3 x 2048 x 1024 and projections 16 x 4 x 2048 x 2048, of 6,919,161,856."""
    config = OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
    )
    spec = AdapterSpec(16, 32.0, (ATTENTION, EXPERTS))
    counts = adapter_counts(config, AdapterPlan(spec, quantized=True))
    assert counts.base == 6_919_161_856
    assert counts.quantized == 16 * (64 * 3 * 2048 * 1024 + 4 * 2048 * 2048)
    # Per layer 4 projections of 16 x (2048 + 2048), and per expert 16 x (2048 + 2048) and 16 x (1024 + 2048).
    assert counts.trained == 16 * 16 * (4 * 4096 + 64 * (4096 + 3072))
    assert "97.0% of the model is held in 4 bits" in str(counts)
