"""Shared experts, norms and initialization other than those of the released model; what is exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from olmoe_train.checkpoint.convert.export import write_export
from olmoe_train.checkpoint.convert.stored_model import StoredModel
from olmoe_train.config.choices import ExportFormat
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.initialization import initial_value
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.model.norm import NonparametricLayerNorm, OlmoeRMSNorm
from olmoe_train.utils.errors import UserError
from tests.support.sizes import SIZES


def test_shared_experts_are_added_to_the_routed_ones() -> None:
    """Two shared experts of width 16 beside the routed ones: the sum of their MLPs, each for itself."""
    block = OlmoeSparseMoeBlock(OlmoeConfig(**SIZES | {"num_shared_experts": 2})).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x_BSD = torch.randn(2, 5, 32, dtype=torch.float64)
    both, shared = block(x_BSD)[0], block.shared_experts
    assert shared is not None
    halves = zip(
        shared.gate_proj.weight.chunk(2),
        shared.up_proj.weight.chunk(2),
        shared.down_proj.weight.chunk(2, dim=1),
        strict=True,
    )
    block.shared_experts = None
    expected = block(x_BSD)[0]
    for gate_FD, up_FD, down_DF in halves:
        expected = expected + (F.silu(x_BSD @ gate_FD.T) * (x_BSD @ up_FD.T)) @ down_DF.T
    torch.testing.assert_close(both, expected)


def test_gradients_of_shared_experts_are_finite_differences() -> None:
    config = OlmoeConfig(**SIZES | {"hidden_size": 8, "intermediate_size": 3, "num_shared_experts": 2})
    shared = OlmoeSparseMoeBlock(config).double().shared_experts
    assert shared is not None
    weights = [torch.randn_like(weight, requires_grad=True) for weight in shared.parameters()]
    names = [name for name, _ in shared.named_parameters()]

    def output(x_TD: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(shared, dict(zip(names, values, strict=True)), (x_TD,))

    x_TD = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (x_TD, *weights))


def test_nonparametric_layer_norm_by_hand() -> None:
    """Mean 3 and variance 4; with eps=5 the divisor is 3."""
    norm = NonparametricLayerNorm(eps=5.0)
    assert norm(torch.tensor([1.0, 5.0])).tolist() == pytest.approx([-2 / 3, 2 / 3])
    assert not list(norm.parameters())
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"norm": "nonparametric"}))
    assert not any(isinstance(module, OlmoeRMSNorm) for module in model.modules())
    assert sum(isinstance(module, NonparametricLayerNorm) for module in model.modules()) == 3 * 4 + 1


def test_without_qk_norm_queries_and_keys_are_not_normalized() -> None:
    """Scaled up, they change the output; with the norms they do not."""
    ids, shifts = torch.randint(2, 90, (1, 8)), []
    for qk_norm in (True, False):
        model = OlmoeForCausalLM(OlmoeConfig(**SIZES | {"qk_norm": qk_norm, "rms_norm_eps": 1e-12}))
        before = model(ids).logits
        with torch.no_grad():
            for layer in model.decoder_layers:
                layer.self_attn.q_proj.weight.mul_(100)
        shifts.append((model(ids).logits - before).abs().max().item())
        assert any("q_norm" in name for name, _ in model.named_parameters()) is qk_norm
    assert shifts[0] < 1e-5 < 1e-3 < shifts[1]


def test_a_normal_distribution_is_not_cut() -> None:
    """Beyond 3 deviations are 0.27% of a normal distribution: 2,831 of 2^20 values, give or take 53."""
    values = initial_value("w", (1024, 1024), 1, 0.5, distribution="normal")
    assert values.std().item() == pytest.approx(0.5, rel=0.005)
    assert 2831 - 5 * 53 < (values.abs() > 1.5).sum().item() < 2831 + 5 * 53
    assert (initial_value("w", (1024, 1024), 1, 0.5).abs() <= 1.5).all()
    stacked = initial_value("w", (4, 8, 8), 1, 0.5, distribution="normal")
    assert torch.equal(initial_value("w", (4, 8, 8), 1, 0.5, [2], "normal")[0], stacked[2])


NOT_RELEASED: list[tuple[dict[str, Any], str]] = [
    (
        {"num_shared_experts": 1, "qk_norm": False},
        r"model\.num_shared_experts=1, model\.qk_norm=false: neither",
    ),
    (
        {"routing": "expert_choice", "expert_capacity": 2.0},
        r"routing=expert_choice, model\.expert_capacity=2\.0:",
    ),
    ({"norm": "nonparametric"}, r"model\.norm=nonparametric:"),
]


@pytest.mark.parametrize(("changes", "named"), NOT_RELEASED)
def test_exports_name_what_they_cannot_represent(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES | changes))
    stored = StoredModel("a run", model.config, lambda name: model.get_parameter(name).detach(), tmp_path)
    for export in (
        lambda: model.save_pretrained(tmp_path / "hf"),
        lambda: write_export(stored, tmp_path / "out", torch.float32, format=ExportFormat.olmo),
    ):
        with pytest.raises(UserError, match=named):
            export()
    assert not list(tmp_path.iterdir())
    # A copy by way of the content of a file keeps them.
    assert OlmoeConfig.from_dict(model.config.to_dict()) == model.config


def test_config_json_is_transformers_own(tmp_path: Path) -> None:
    """Also of a model with other initial weights, which is an ordinary model."""
    for changes in ({}, {"initialization": "normal"}):
        config = OlmoeConfig(**SIZES | changes)
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert not written.keys() & {"num_shared_experts", "routing", "qk_norm", "norm", "initialization"}
