"""The routers' part of every objective: their losses, their sums over the step, and the balancer's update.

Shapes: L layers, E experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.model import OlmoeForCausalLM
from olmoe_train.model.moe.balancing import Balancer
from olmoe_train.model.moe.router_stats import RouterStats
from olmoe_train.training.batch import Batch, Totals, decoder_inputs
from olmoe_train.training.objectives.base import RouterSums


class RouterTerms:
    """Adds what the balancer of a model computes to an objective's loss.

    A dense model (one expert) has no router losses: LB is constant there, and Z would pull at the hidden
    states. The same holds for frozen routers, next to an adapter: no loss can train them. Both report the
    terms, without a weight.
    """

    def __init__(self, model: OlmoeForCausalLM, device: torch.device) -> None:
        assert model.balancer is not None, "build_model sets the balancer"
        self.balancer: Balancer = model.balancer
        self.layers, self.experts = model.config.num_hidden_layers, model.config.num_experts
        self.device = device
        router = model.decoder_layers[0].mlp.gate.weight
        self.weighted = self.experts > 1 and router.requires_grad
        self.sums = RouterSums.zeros(self.layers, self.experts, device)
        self._count_micro_batch = False
        self._global_counts_LE: Tensor | None = None

    def begin_step(
        self,
        model: OlmoeForCausalLM,
        micro_batches: list[Batch],
        logged: bool,
        within: Callable[[Batch], AbstractContextManager[Any]] = lambda batch: nullcontext(),
    ) -> None:
        """Reset the sums, and count the experts' load of the whole step if the balancer needs the counts.

        The gradient of the first micro-batch then depends on where the last one is routed, so a step of
        several micro-batches needs one more forward pass per micro-batch. Collective.

        Args:
            model: Called without gradients.
            micro_batches: This rank's.
            logged: Whether the step's values are logged.
            within: The context of the forward pass of a micro-batch.
        """
        self.sums = RouterSums.zeros(self.layers, self.experts, self.device)
        self._global_counts_LE = None
        needed = (logged or self.weighted) and self.balancer.needs_loss(logged)
        needed = needed and self.experts > 1 and self.balancer.over_global_batch
        self._count_micro_batch = needed and len(micro_batches) == 1
        if needed and len(micro_batches) > 1:
            counts_LE = torch.zeros(self.layers, self.experts, device=self.device)
            with torch.no_grad():
                for batch in micro_batches:
                    with within(batch):
                        counts_LE += model.training_forward(**decoder_inputs(batch)).router.counts_LE
            dist.all_reduce(counts_LE)
            self._global_counts_LE = counts_LE

    def add(self, loss: Tensor, stats: RouterStats, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the routers' share to the share of `loss`; also return the shares of the routers' terms.

        Args:
            loss: Share of one micro-batch in the objective's loss, a scalar.
            stats: Sums over the micro-batch.
            totals: Counts over the global batch.
        """
        share, terms = self.balancer.loss(stats, totals.num_tokens, self._counts(stats.counts_LE, totals))
        self.sums.counts_LE += stats.counts_LE
        self.sums.entropy_L += stats.entropy_L / totals.num_tokens
        self.sums.z_L += stats.squared_logsumexp_L.detach() / totals.num_tokens
        return (loss + share if self.weighted else loss), terms

    def end_step(self, skipped: Tensor) -> None:
        """Let the balancer see the counts of the global batch. Collective if the balancer has a state.

        Args:
            skipped: bool scalar, whether the step's update was not applied.
        """
        if self.balancer.has_state:
            counts_LE = self.sums.counts_LE.masked_fill(skipped, 0)
            dist.all_reduce(counts_LE)
            self.balancer.update(counts_LE)

    def _counts(self, counts_LE: Tensor, totals: Totals) -> Tensor | None:
        """Expert counts of the batch that the load-balancing loss is about; None: of the micro-batch."""
        if self.experts == 1:
            return totals.num_tokens.expand_as(counts_LE)
        if self._count_micro_batch:
            total_LE = counts_LE.clone()
            dist.all_reduce(total_LE)
            return total_LE
        return self._global_counts_LE
