"""One optimizer step of a run on fake tensors, which have a shape and a dtype, but no memory and no values.

The model, its layout and its engine are those of training (training/build.py). Three things depend on values
and are decided here: the initial weights are left out; the experts are multiplied by the grouped kernel, as on
a GPU, because the loop over experts reads the rows of each; and with expert parallelism every rank gets an
even share of the rows, where a real step reads from the other ranks how many rows they send.

Shapes: T tokens, D hidden, E experts, K top-k, P ranks of the group, R rows that a rank sends (T x K).
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from olmoe_train.config.choices import ExpertsBackend
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.config.train import TrainConfig
from olmoe_train.distributed.expert_parallel import Exchange
from olmoe_train.distributed.materialize import reset_buffers
from olmoe_train.distributed.mesh import Mesh
from olmoe_train.distributed.trained_experts import mask_frozen_experts
from olmoe_train.model import OlmoeForCausalLM
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


def without_values() -> FakeTensorMode:
    """The context in which tensors have no values. Tensors that were made before it lose theirs in it."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def as_it_can_be_faked(cfg: TrainConfig) -> TrainConfig:
    """A run's configuration without torch.compile, which compiles nothing that has no values, and with the
    grouped kernel."""
    model = replace(cfg.model, init_from=None, adapter_from=None, experts_backend=ExpertsBackend.grouped_mm)
    return replace(cfg, model=model, trainer=replace(cfg.trainer, compile=False))


def allocate(cfg: TrainConfig, model: OlmoeForCausalLM, mesh: Mesh) -> None:
    """Do to a model in its layout what `build_model` does, except for the values. In `without_values`."""
    model.to_empty(device=mesh.device)
    reset_buffers(model)
    if (named := trained_experts(cfg)) is not None:
        mask_frozen_experts(model, named, mesh)
    if mesh.expert is not None:
        for layer in model.decoder_layers:
            layer.mlp.dispatch = partial(
                _dispatch_evenly, dispatch=layer.mlp.dispatch, ranks=mesh.expert["expert"].size()
            )


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
    """`dispatch` of expert_parallel.py, without its exchange of counts."""
    routing = routing or even_routing(expert_indices_TK, num_experts, ranks)
    return dispatch(x_TD, weights_TK, expert_indices_TK, num_experts, routing=routing)


def even_routing(expert_indices_TK: Tensor, num_experts: int, ranks: int) -> Routing:
    """The routing of a dispatch in which each of P ranks sends R / P rows to every rank."""
    rows = expert_indices_TK.numel()
    share = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
    exchange = Exchange(share, share, sort_by_expert(expert_indices_TK, num_experts))
    arrived_N = torch.arange(rows)
    counts_Q = torch.zeros(num_experts // ranks, dtype=torch.long)
    return Routing(arrived_N, arrived_N, arrived_N[:, None], counts_Q, exchange=exchange)


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
