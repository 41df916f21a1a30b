"""Muon where FSDP2 cuts matrices: the same gradients, whole on one process, and sharded on four ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from olmoe_train.config.choices import Strategy
from olmoe_train.config.optimizer import MuonConfig, NorMuonConfig, OptimizerConfig
from olmoe_train.config.train import ParallelConfig
from olmoe_train.distributed.mesh import local_tensor
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import parameter_groups
from tests.support.ranks import run_ranks
from tests.support.sizes import SIZES
from tests.support.tiny import build, whole

# Over four ranks, two experts are cut inside, and 6 rows of a projection are 2, 2, 2 and nothing.
CUT: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "hidden_size": 6, "num_attention_heads": 1}
LAYOUTS = {
    "fsdp": ParallelConfig(),
    "experts 2": ParallelConfig(expert_parallel_size=2),
    "2 copies": ParallelConfig(replicate_size=2),
    "2 copies, experts 2": ParallelConfig(replicate_size=2, expert_parallel_size=2),
    "ddp": ParallelConfig(strategy=Strategy.ddp),
}


KINDS = (MuonConfig(lr=0.1), NorMuonConfig(lr=0.1))


def make_steps(model: OlmoeForCausalLM, cfg: OptimizerConfig) -> None:
    optimizer = build_optimizer(parameter_groups(model, cfg), cfg)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()


def on_each_layout() -> dict[str, dict[str, Tensor]]:
    """On each rank: the weights before and after two steps of each kind, whole, by layout and kind."""
    weights = {}
    for name, layout in LAYOUTS.items():
        model, _ = build(layout, **CUT)
        if name == "fsdp":
            rows = [local_tensor(layer.self_attn.q_proj.weight).shape[0] for layer in model.decoder_layers]
            assert rows == [0 if dist.get_rank() == 3 else 2] * 3
        weights[f"{name}, before"] = {key: whole(value) for key, value in model.named_parameters()}
        for cfg in KINDS:
            make_steps(model, cfg)
            weights[f"{name}, {cfg.name}"] = {key: whole(value) for key, value in model.named_parameters()}
    return weights


@pytest.mark.ranks
def test_cut_matrices_move_as_whole_ones() -> None:
    ranks = run_ranks(4, on_each_layout)
    for name in LAYOUTS:
        model = OlmoeForCausalLM(OlmoeConfig(**SIZES | CUT))
        model.load_state_dict(ranks[0][f"{name}, before"], strict=True)
        for cfg in KINDS:
            make_steps(model, cfg)
            for key, expected in model.named_parameters():
                for weights in ranks:
                    error = (weights[f"{name}, {cfg.name}"][key] - expected).norm()
                    assert error < 1e-6 * expected.norm(), (name, cfg.name, key)
