"""FLOPs and parameter counts against numbers worked by hand, torch's own counter and the real model."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.planning.flops import parameter_counts, peak_flops, train_flops_per_token

OLMOE_1B_7B = OlmoeConfig(intermediate_size=1024)  # the other defaults are the released model's

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
}
VARIANTS = [
    pytest.param({}, id="multi_head"),
    pytest.param({"num_key_value_heads": 2}, id="grouped_query"),
    pytest.param({"num_key_value_heads": 1, "attention_bias": True}, id="one_kv_head_with_biases"),
    pytest.param({"tie_word_embeddings": True}, id="tied_head"),
    pytest.param({"num_shared_experts": 2, "qk_norm": False}, id="shared_experts_without_qk_norm"),
    pytest.param(
        {"routing": "expert_choice", "expert_capacity": 1.5, "norm": "nonparametric"}, id="expert_choice"
    ),
]


def test_released_model_by_hand() -> None:
    """L=16 D=2048 F=1024 E=64 K=8 V=50304, 16 heads of 128, S=4096; each product is written out."""
    flops = train_flops_per_token(OLMOE_1B_7B, sequence_length=4096)
    assert flops.experts == 6 * 16 * 8 * 3 * 2048 * 1024 == 4_831_838_208
    assert flops.attention_projections == 6 * 16 * 4 * 2048 * 2048 == 1_610_612_736
    assert flops.head == 6 * 2048 * 50304 == 618_135_552
    assert flops.router == 6 * 16 * 2048 * 64 == 12_582_912
    assert flops.causal_attention == 6 * 16 * 2048 * 4097 == 805_502_976
    assert flops.total == 7_878_672_384


def test_released_model_parameters() -> None:
    counts = parameter_counts(OLMOE_1B_7B)
    assert counts.total == 6_919_161_856
    # 56 of 64 experts in 16 layers do not act: 16 * 56 * 3 * 2048 * 1024 = 5,637,144,576
    assert counts.active == 6_919_161_856 - 5_637_144_576 == 1_282_017_280


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_is_the_models(variant: dict[str, Any]) -> None:
    config = OlmoeConfig(**{**SMALL, **variant})
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_what_torch_counts(variant: dict[str, Any]) -> None:
    """The counter sees one thing that ours leaves out: masked attention (S keys a token where (S + 1) / 2
    are met). The weighted sum of the expert outputs is no matmul (embedding_bag), and counted by neither."""
    batch, length = 2, 16
    config = OlmoeConfig(**{**SMALL, **variant})
    model = OlmoeForCausalLM(config)
    # sdpa's math kernel is made of matmuls, which the counter knows; the fused CPU kernel is opaque to it.
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        tokens = torch.randint(2, config.vocab_size, (batch, length))
        model(tokens).logits.float().square().sum().backward()
    ours = train_flops_per_token(config, length)
    full_attention = ours.causal_attention * length / ((length + 1) / 2)
    per_token = ours.total - ours.causal_attention + full_attention
    assert counter.get_total_flops() == per_token * batch * length


def test_peak_of_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989.5e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756.5e12
    assert peak_flops("NVIDIA GH200 480GB", torch.bfloat16) == 989.5e12
    assert peak_flops("NVIDIA GB200", torch.bfloat16) == 2500e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12


def test_peak_unknown_is_none_and_not_a_guess() -> None:
    assert peak_flops("cpu", torch.bfloat16) is None
    assert peak_flops("NVIDIA GeForce GTX 1080", torch.bfloat16) is None
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float64) is None
