"""Initial weights: their distribution, and that they depend on (seed, name, expert) alone."""

import math

import pytest
import torch

from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.initialization import init_weights, initial_value


def test_truncated_normal_at_three_standard_deviations() -> None:
    value = initial_value("w", (1000, 1000), seed=0, std=0.02)
    assert value.abs().max().item() <= 0.06
    assert value.abs().max().item() > 0.0597  # of a million draws, some come near the cut
    # Cut at 3 deviations, a normal keeps sqrt(1 - 2 * 3 phi(3) / (2 Phi(3) - 1)) = 0.98658 of its own.
    phi, mass = math.exp(-4.5) / math.sqrt(2 * math.pi), math.erf(3 / math.sqrt(2))
    assert value.std().item() == pytest.approx(0.02 * math.sqrt(1 - 6 * phi / mass), rel=3e-3)
    assert value.mean().item() == pytest.approx(0.0, abs=1e-4)


def test_norms_are_one_and_biases_zero() -> None:
    assert torch.equal(initial_value("model.norm.weight", (5,), 0, 0.02), torch.ones(5))
    assert torch.equal(initial_value("q_proj.bias", (5,), 0, 0.02), torch.zeros(5))


def test_experts_are_drawn_one_by_one() -> None:
    whole = initial_value("experts.down_proj", (6, 4, 3), 7, 0.02)
    some = initial_value("experts.down_proj", (6, 4, 3), 7, 0.02, experts=[4, 1])
    assert torch.equal(some, whole[[4, 1]])
    assert not torch.equal(whole[0], whole[1])
    assert initial_value("experts.down_proj", (6, 4, 3), 7, 0.02, experts=[]).shape == (0, 4, 3)


def test_seed_and_name_matter_and_nothing_else() -> None:
    first = initial_value("a", (4, 4), 0, 0.02)
    torch.rand(10)
    assert torch.equal(first, initial_value("a", (4, 4), 0, 0.02))
    assert not torch.equal(first, initial_value("b", (4, 4), 0, 0.02))
    assert not torch.equal(first, initial_value("a", (4, 4), 1, 0.02))


def test_every_parameter_of_a_model_is_filled() -> None:
    config = OlmoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
        eos_token_id=0,
    )
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    init_weights(model, 3, config.initializer_range)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(model.get_parameter(name), initial_value(name, (4, 16, 16), 3, 0.02))
    assert torch.equal(model.get_parameter("model.norm.weight"), torch.ones(16))
