"""One optimizer step of a run on fake tensors, which have a shape and a dtype, but no memory and no values.

The model, its layout and its engine are those of training (training/build.py). What depends on values is
decided here. The initial weights are left out. Every expert gets an even share of the rows, where a real step
counts them, and reads from the other ranks how many rows they send.

Shapes: T tokens, D hidden, E experts, K top-k, P ranks of the group, Q = E/P experts per rank.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from olmoe_train.config.adapter import quantizes_base
from olmoe_train.config.choices import ExpertsBackend, Precision
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.expert_parallel import Exchange
from olmoe_train.distributed.materialize import reset_buffers
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.distributed.trained_experts import mask_frozen_experts
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.adapters.experts import LoraExperts
from olmoe_train.model.moe.block import Dispatch
from olmoe_train.model.moe.experts import Routing, sort_by_expert
from olmoe_train.optim.skip_step import SkipGuard
from olmoe_train.training.batch import Batch, Totals
from olmoe_train.training.build import trained_experts
from olmoe_train.training.engine.base import Engine
from olmoe_train.training.objectives.base import Objective
from olmoe_train.training.objectives.next_token import NextToken
from olmoe_train.training.objectives.preference import Preference
from olmoe_train.training.objectives.reference import NoReference
from olmoe_train.training.preflight.backend import backend_errors


def without_values() -> FakeTensorMode:
    """The context in which tensors have no values. Tensors that were made before it lose theirs in it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def as_it_can_be_faked(cfg: TrainConfig) -> TrainConfig:
    """A run's configuration without torch.compile, which compiles nothing that has no values.

    Experts are multiplied by the grouped kernel where torch can say its shapes: in bf16. Otherwise a loop
    over the experts multiplies them, in fp32, because in bf16 the loop pads the rows by their number.
    """
    backend, trainer = ExpertsBackend.grouped_mm, replace(cfg.trainer, compile=False)
    model = replace(cfg.model, init_from=None, adapter_from=None, experts_backend=backend)
    grouped = replace(cfg, model=model, trainer=trainer)
    if (
        trainer.precision is Precision.bf16
        and not backend_errors(grouped)
        and not quantizes_base(cfg.adapter)
    ):
        return grouped
    model = replace(model, experts_backend=ExpertsBackend.loop)
    return replace(cfg, model=model, trainer=replace(trainer, precision=Precision.fp32))


def allocate(cfg: TrainConfig, model: OlmoeForCausalLM, mesh: Mesh) -> None:
    """Do to a model in its layout what `build_model` does, except for the values. In `without_values`."""
    model.to_empty(device=mesh.device)
    reset_buffers(model)
    if (named := trained_experts(cfg)) is not None:
        mask_frozen_experts(model, named, mesh)
    ranks = mesh.expert["expert"].size() if mesh.expert is not None else 1
    for layer in model.decoder_layers:
        layer.mlp.dispatch = partial(_dispatch_evenly, dispatch=layer.mlp.dispatch, ranks=ranks)
        if isinstance(layer.mlp.experts, LoraExperts):
            layer.mlp.experts.dropout = 0.0  # the host reads its seed


def _dispatch_evenly(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_indices_TK: Tensor,
    num_experts: int,
    *,
    dispatch: Dispatch,
    ranks: int,
    routing: Routing | None = None,
) -> tuple[Tensor, Tensor | None, Routing]:
    """The block's own dispatch, with an even routing."""
    routing = routing or even_routing(expert_indices_TK, num_experts, ranks)
    return dispatch(x_TD, weights_TK, expert_indices_TK, num_experts, routing=routing)


def even_routing(expert_indices_TK: Tensor, num_experts: int, ranks: int) -> Routing:
    """The routing of a dispatch in which every rank sends the same number of rows to every expert.

    Its counts have values, which the loop over experts reads, as it reads those of a real routing.
    """
    local, rows = sort_by_expert(expert_indices_TK, num_experts), expert_indices_TK.numel()
    with unset_fake_temporarily():
        counts_Q = torch.tensor(even_shares(rows, num_experts // ranks))
    if ranks == 1:
        return replace(local, counts_E=counts_Q)
    share, arrived_N = even_shares(rows, ranks), torch.arange(rows)
    return Routing(arrived_N, arrived_N, arrived_N[:, None], counts_Q, exchange=Exchange(share, share, local))


def even_shares(total: int, parts: int) -> list[int]:
    """Whole numbers that add up to `total` and differ by at most 1, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def objective_of(cfg: TrainConfig, model: OlmoeForCausalLM, from_data: bool, mesh: Mesh) -> Objective:
    """The objective of the step.

    Args:
        cfg: The run's.
        model: With its balancer.
        from_data: Whether the batch is one of the prepared data. Without data, and where the answers would be
            sampled first, it is next-token prediction on as many rows.
        mesh: Has the device.
    """
    if from_data and isinstance(cfg.objective, PreferenceConfig):
        return Preference(cfg.objective, model, NoReference(), cfg.trainer.global_batch_size, mesh.device)
    return NextToken(model, mesh.device)


def fake_step(cfg: TrainConfig, engine: Engine, objective: Objective, batch: Batch, totals: Totals) -> None:
    """Forward, backward, clipping and update with one micro-batch. In `without_values`."""
    guard = SkipGuard(cfg.trainer, None, engine.device)
    micro_batch = {name: torch.empty_like(column) for name, column in batch.items()}
    engine.set_learning_rate(1.0)
    totals = objective.begin_step(engine.model, [micro_batch], totals, True)
    loss, _ = objective(engine.model, micro_batch, totals)
    engine.backward(loss, last=True)

    def judge(grad_norm: Tensor) -> Tensor:
        guard.judge(1, loss, grad_norm)
        return torch.tensor(False)  # a constant, which the host may read

    outcome = engine.step(judge)
    objective.end_step(engine.model, totals, outcome.skipped)


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the state that it has after a step. In `without_values`."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
