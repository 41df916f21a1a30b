"""Options of `balancing` that are refused, and those that have no effect."""

import pytest

from olmoe_train.config import compose
from olmoe_train.training.preflight.balancing import balancing_without_effect
from olmoe_train.training.preflight.checks import configuration_errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["balancing.router_jitter=1.0"], "balancing.router_jitter=1.0: must be at least 0 and below 1"),
        (["balancing.router_temperature=0"], "balancing.router_temperature=0.0: must be positive"),
        (
            ["balancing=loss_free", "balancing.bias_update_rate=-1"],
            "bias_update_rate=-1.0: must not be negative",
        ),
        (["balancing=loss_free", "checkpoint.export_every=5"], "no parameter for the bias"),
        (["balancing=loss_free", "adapter=lora"], "balancing=loss_free with adapter=lora: it changes the"),
        (["balancing=loss_free", "model.num_experts=1"], "a dense model has no router"),
        (["balancing=sequence", "loss.convention=hf"], "balancing=sequence with loss.convention=hf"),
        (
            ["balancing=loss_free", "balancing.sequence_coef=0.1", "objective=preference"],
            "balancing.sequence_coef=0.1 with objective=preference: this objective packs",
        ),
    ],
)
def test_balancing_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    errors = configuration_errors(compose("data.dir=x", *overrides), world_size=1)
    assert len([error for error in errors if message in error]) == 1


@pytest.mark.parametrize(
    ("overrides", "warnings"),
    [
        (["balancing=loss_free"], []),
        (
            ["balancing=none", "loss.router_aux_loss_coef=0.1"],
            ["loss.router_aux_loss_coef=0.1 has no effect: balancing=none has no such loss"],
        ),
        (
            ["balancing=sequence", "loss.router_aux_loss_coef=0"],
            ["balancing=sequence has no effect: loss.router_aux_loss_coef=0"],
        ),
        (
            ["balancing.router_jitter=0.1", "model.num_experts=1", "model.num_experts_per_tok=1"],
            [
                "balancing.router_jitter has no effect: a dense model (model.num_experts=1) has no router",
            ],
        ),
    ],
)
def test_balancing_without_effect_warns(overrides: list[str], warnings: list[str]) -> None:
    assert balancing_without_effect(compose("data.dir=x", *overrides)) == warnings
