"""What the paths of benchmarks/on_gpu.py are held against: the same weights and tokens in fp32.

The weights are values that bf16 represents, so that a difference is one of the computation.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.gpu_models import Loss, build, fields, loss_and_gradients, off, our_loss, random_ids
from benchmarks.gpu_rows import Report
from olmoe_train.config.adapter import AdapterConfig, NoAdapterConfig
from olmoe_train.config.choices import Precision, Strategy
from olmoe_train.config.optimizer import AdamWConfig, OptimizerConfig
from olmoe_train.config.train import ParallelConfig, TrainerConfig
from olmoe_train.distributed.fsdp import reshard
from olmoe_train.distributed.materialize import reset_buffers, shard_slices
from olmoe_train.distributed.mesh import Mesh, build_mesh, init_distributed, local_tensor
from olmoe_train.distributed.parallelize import parallelize
from olmoe_train.model import OlmoeConfig, OlmoeForCausalLM
from olmoe_train.model.adapters.add import magnitude_of, quantized_weights
from olmoe_train.model.adapters.nf4 import round_trip_nf4
from olmoe_train.model.adapters.spec import adapter_names, is_adapter_parameter
from olmoe_train.optim.build import build_optimizer
from olmoe_train.optim.roles import parameter_groups
from olmoe_train.planning.adapter import adapter_plan, meta_model
from olmoe_train.training.engine.fsdp import FsdpEngine

LOSS_FP32, GRADIENT_FP32 = 1e-5, 1e-3
"""Relative errors that pass in fp32: sums in another order."""
LOSS_BF16 = 1e-3
"""Relative error of a loss that passes in bf16, as in gpu_models.check_parity."""
GRADIENT_BF16 = 0.1
"""Relative error of a gradient that passes in bf16 where there is no plain bf16 model to compare with."""


class Yardstick:
    """Loss and gradients in fp32 by the loop over experts, and those of the same code in plain bf16."""

    def __init__(
        self,
        args: argparse.Namespace,
        loss_of: Callable[[OlmoeForCausalLM], Loss] = lambda model: our_loss(model, "loop"),
    ) -> None:
        """loss_of: from a model to its loss of token ids."""
        model = build(args, layers_to_check(args))
        self.config, self.ids_BS = model.config, random_ids(args, 1)
        bf16_loss, bf16 = loss_and_gradients(model, loss_of(model), self.ids_BS)
        model.float()
        self.loss, self.gradients = loss_and_gradients(model, loss_of(model), self.ids_BS)
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.bf16_loss = abs(bf16_loss - self.loss) / self.loss
        self.bf16_errors = {name: off(bf16[name], value) for name, value in self.gradients.items()}

    def check(
        self, report: Report, what: str, loss: float, gradients: Mapping[str, Tensor], precision: Precision
    ) -> None:
        """Two rows: relative error of the loss, and the gradient that is the most beyond its tolerance.

        In bf16 a gradient may be 1.5 times as far off as that of plain bf16, plus 0.01.
        """
        assert gradients.keys() == self.gradients.keys()
        in_bf16 = precision is Precision.bf16
        least = LOSS_BF16 if in_bf16 else LOSS_FP32
        report.check(
            f"{what}: loss", abs(loss - self.loss) / self.loss, max(least, 1.5 * self.bf16_loss * in_bf16)
        )
        errors = {name: off(gradients[name], value) for name, value in self.gradients.items()}
        allowed = {name: 1.5 * self.bf16_errors[name] + 0.01 if in_bf16 else GRADIENT_FP32 for name in errors}
        worst = max(errors, key=lambda name: _excess(errors[name], allowed[name]))
        report.check(f"{what}: gradients", errors[worst], allowed[worst], f"worst is {worst}")


def _excess(error: float, tolerance: float) -> float:
    return math.inf if math.isnan(error) else error / tolerance


def layers_to_check(args: argparse.Namespace) -> int:
    """Two layers show what sixteen do, up to rounding."""
    return min(2, args.layers or 2)


# --- engines ----------------------------------------------------------------------------------------------


def build_engine(
    args: argparse.Namespace,
    weights: Mapping[str, Tensor],
    trainer: TrainerConfig,
    optimizer: OptimizerConfig | None = None,
    adapter: AdapterConfig | None = None,
    expert_parallel: bool = False,
    layers: int | None = None,
) -> FsdpEngine:
    """The trainer's own engine over the ranks there are, with given weights.

    Args:
        args: The shape.
        weights: Whole weights by name, on the device.
        trainer: precision, compile and activation_checkpointing.
        optimizer: AdamW if None.
        adapter: What is trained; everything if None.
        expert_parallel: Whether all ranks share the experts; one rank then exchanges rows with itself.
        layers: Of the model; layers_to_check if None.
    """
    optimizer = optimizer or AdamWConfig()
    plan = adapter_plan(adapter or NoAdapterConfig())
    config = OlmoeConfig(**fields(args, layers or layers_to_check(args)))
    model = meta_model(config, plan, trainer.precision)
    mesh = mesh_of(args, expert_parallel)
    model.set_experts_backend("auto")
    parallelize(model, trainer, ParallelConfig(strategy=Strategy.fsdp), mesh)
    model.to_empty(device=mesh.device)
    reset_buffers(model)
    fill(model, weights)
    groups = parameter_groups(model, optimizer)
    return FsdpEngine(model, build_optimizer(groups, optimizer), optimizer.max_grad_norm, mesh.device)


def mesh_of(args: argparse.Namespace, expert_parallel: bool) -> Mesh:
    """All ranks of the process group, which is made with one rank if there is none."""
    device = init_distributed(args.device)
    mesh = build_mesh(ParallelConfig(strategy=Strategy.fsdp), device)
    if not expert_parallel:
        return mesh
    names = ("replicate", "expert_shard", "expert")
    shape = (1, 1, torch.distributed.get_world_size())
    return replace(mesh, expert=init_device_mesh(device.type, shape, mesh_dim_names=names))


@torch.no_grad()
def fill(model: OlmoeForCausalLM, weights: Mapping[str, Tensor]) -> None:
    """Give a parallelized model whole weights; an adapter gets random ones, with B not 0, so that A has a
    gradient, and DoRA's magnitudes are the norms of the rows."""
    quantized = quantized_weights(model)
    parameters = dict(model.named_parameters())
    torch.manual_seed(1)
    for name, parameter in parameters.items():
        if name in weights:
            local_tensor(parameter).copy_(weights[name][shard_slices(parameter)])
        elif not name.endswith("magnitude"):
            assert is_adapter_parameter(name), name
            local_tensor(parameter).normal_(0.0, 0.02)
    for name, weight in weights.items():
        if name in quantized:
            quantized[name].set_weight(weight)
        magnitude = adapter_names(name)[2]
        if magnitude in parameters:
            value = round_trip_nf4(weight) if name in quantized else weight
            local_tensor(parameters[magnitude]).copy_(magnitude_of(magnitude, value))


def loss_of_engine(engine: Any, ids_BS: Tensor) -> Tensor:
    """This rank's share of the loss; every rank has the same tokens."""
    ids_BS = ids_BS.to(engine.device)
    return our_loss(engine.model, backend_of(engine.model))(ids_BS) / torch.distributed.get_world_size()


def backend_of(model: OlmoeForCausalLM) -> str:
    return model.decoder_layers[0].mlp.experts.backend


def engine_gradients(engine: FsdpEngine, ids_BS: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the whole gradient of every trained parameter, which stays in the engine, too."""
    loss = loss_of_engine(engine, ids_BS)
    engine.backward(loss, last=True)
    gradients = {
        name: whole(parameter.grad).float()
        for name, parameter in engine.model.named_parameters()
        if parameter.grad is not None
    }
    return loss.item() * torch.distributed.get_world_size(), gradients


def whole(tensor: Tensor) -> Tensor:
    """A copy of the whole of a tensor that ranks may share."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    assert isinstance(full, Tensor)
    return full.detach().clone()


def check_engine(
    report: Report, what: str, engine: FsdpEngine, yardstick: Yardstick, precision: Precision
) -> None:
    """Loss and gradients; then one update, after which the loss of the same tokens has to be lower."""
    loss, gradients = engine_gradients(engine, yardstick.ids_BS)
    yardstick.check(report, what, loss, gradients, precision)
    check_update(report, what, engine, yardstick.ids_BS, loss)


def check_update(report: Report, what: str, engine: Any, ids_BS: Tensor, loss: float) -> None:
    """An update of the gradients that the engine has."""
    outcome = engine.step(lambda grad_norm: ~torch.isfinite(grad_norm))
    assert not outcome.skipped, "the gradient is not finite"
    with torch.no_grad():
        after = loss_of_engine(engine, ids_BS).item() * torch.distributed.get_world_size()
    reshard(engine.model)  # else the model has its gathered parameters in bf16
    report.check(f"{what}: loss after an update / before", after / loss, 1.0)
