"""Router analyses during training, on the same few validation tokens.

Shapes: T unpadded tokens of a batch, E experts, K top-k, L layers, N domains (sources of a mixture).
"""

import logging
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.convert.stored_model import load_whole, open_stored_model, split_step
from olmoe_train.config.train import LoggingConfig
from olmoe_train.data.loader import TrainingData
from olmoe_train.data.mixture import has_sources
from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.routing_record import record_routing
from olmoe_train.reporting.router_analysis import domain_specialization, saturation
from olmoe_train.reporting.routing_counts import (
    Batch,
    count_experts,
    count_shared,
    domain_batches,
    validated_components,
)
from olmoe_train.run.loggers import MetricsLog
from olmoe_train.training.callbacks.base import Callback, StepReport
from olmoe_train.training.state import TrainState
from olmoe_train.training.throughput import Throughput

log = logging.getLogger(__name__)

Heartbeat = Callable[[Iterable[Batch]], Iterable[Batch]]
Routing = list[list[Tensor]]
"""Of each domain and batch of this rank, the experts of the unpadded tokens: int16 [L, T, K]."""
DIGITS = 5
"""Decimals of the shares that are logged."""


class RouterAnalysis(Callback):
    """router/layer_NN/saturation, agreement_with_previous and domain_share/NAME.

    The forward passes are collective, in the run's own layout. They change no state of the training.
    """

    def __init__(
        self,
        cfg: LoggingConfig,
        micro_batch_size: int,
        dtype: torch.dtype,
        data: TrainingData,
        model: OlmoeForCausalLM,
        metrics: MetricsLog,
        throughput: Throughput,
        with_heartbeat: Heartbeat,
        device: torch.device,
    ) -> None:
        """
        Args:
            cfg: The section `logging`.
            micro_batch_size: Greatest number of sequences per forward pass of one rank.
            dtype: Data type in which the run computes; the reference gets it, too.
            data: The data of the run; its validation split is read.
            model: The model of the run.
            metrics, throughput: Of the run.
            with_heartbeat: Wraps batches, to report progress to the watchdog.
            device: The device of this rank.
        """
        self.cfg, self.dtype, self.data, self.model = cfg, dtype, data, model
        self.metrics, self.throughput, self.with_heartbeat = metrics, throughput, with_heartbeat
        self.device = device
        self.micro_batch_size = min(
            micro_batch_size, -(-cfg.router_analysis_sequences // dist.get_world_size())
        )
        self.reference: Routing | None = None
        self.previous: Routing | None = None

    def on_start(self, state: TrainState) -> None:
        if self.cfg.router_reference is not None:
            self.reference = self._route(load_reference(self.cfg.router_reference, self.dtype, self.device))
        if state.step == 0:
            self._analyze(state)
        elif state.step % self.cfg.router_analysis_every == 0:  # as before the run was interrupted
            self.previous = self._route(self.model)
        self.throughput.restart(state.tokens)

    def on_step(self, state: TrainState, report: StepReport) -> None:
        if state.step % self.cfg.router_analysis_every == 0:
            self._analyze(state)

    def _analyze(self, state: TrainState) -> None:
        routing = self._route(self.model)
        values: dict[str, float | list[float]] = {"step": state.step, "tokens": state.tokens}
        for name, other in (("saturation", self.reference), ("agreement_with_previous", self.previous)):
            if other is not None:
                shares = agreement(routing, other, self.device)
                values |= {f"router/layer_{layer:02d}/{name}": share for layer, share in enumerate(shares)}
                parts = f"layers {', '.join(f'{share:.3f}' for share in shares)}"
                log.info("step %d | router %s: %s", state.step, name.replace("_", " "), parts)
        if has_sources(self.data.cfg):
            values |= self._domain_shares(routing)
        self.previous = routing
        if len(values) > 2:  # before the first step there may be nothing to compare with
            self.metrics.write(values)
        self.throughput.restart(state.tokens)

    def _domain_shares(self, routing: Routing) -> dict[str, list[float]]:
        experts = self.model.config.num_experts
        counts_NLE = torch.stack(
            [torch.stack([count_experts(one.long(), experts) for one in parts]).sum(0) for parts in routing]
        )
        dist.all_reduce(counts_NLE)
        tokens_N = counts_NLE[:, 0].sum(-1) // self.model.config.num_experts_per_tok
        shares_NLE = domain_specialization(counts_NLE.cpu().numpy(), tokens_N.cpu().numpy())
        names = [one.name for one in validated_components(self.data.cfg)]
        return {
            f"router/layer_{layer:02d}/domain_share/{name}": [round(share, DIGITS) for share in shares_E]
            for name, shares_LE in zip(names, shares_NLE.tolist(), strict=True)
            for layer, shares_E in enumerate(shares_LE)
        }

    def _route(self, model: OlmoeForCausalLM) -> Routing:
        """Route the tokens. Collective, if the model is sharded. The model's mode is restored."""
        was_training = model.training
        model.eval()
        batches_N = domain_batches(
            self.data.cfg,
            self.micro_batch_size,
            self.cfg.router_analysis_sequences,
            dist.get_rank(),
            dist.get_world_size(),
        )
        with torch.no_grad():
            routing = [
                [route_batch(model, batch, self.device) for batch in self.with_heartbeat(batches)]
                for batches in batches_N
            ]
        model.train(was_training)
        return routing


def route_batch(model: OlmoeForCausalLM, batch: Batch, device: torch.device) -> Tensor:
    """Return the experts of the unpadded tokens of a batch, int16 [L, T, K]; without the head."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "targets"}
    with record_routing(model) as passes_L:
        model.training_forward(**inputs)
    indices_LTK = torch.stack([indices_TK for (indices_TK,) in passes_L])
    return indices_LTK[:, inputs["attention_mask"].flatten().bool()].to(torch.int16)


def agreement(mine: Routing, theirs: Routing, device: torch.device) -> list[float]:
    """Share of the experts that both routings have, per layer, over the tokens of all ranks. Collective."""
    pairs = [(one, other) for a, b in zip(mine, theirs, strict=True) for one, other in zip(a, b, strict=True)]
    top_k = pairs[0][0].shape[-1]
    shared_L = torch.stack([count_shared(one, other) for one, other in pairs]).sum(0)
    tokens = torch.tensor(sum(one.shape[1] for one, _ in pairs), device=device)
    for tensor in (shared_L, tokens):
        dist.all_reduce(tensor)
    shares: list[float] = saturation(shared_L.cpu().numpy(), int(tokens), top_k).tolist()
    return shares


def load_reference(name: str, dtype: torch.dtype, device: torch.device) -> OlmoeForCausalLM:
    """Load the whole model that logging.router_reference names."""
    directory, step = split_step(name)
    stored = open_stored_model(directory, step or "latest")
    stored.config.dtype = dtype
    return load_whole(stored, device)
