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
from olmoe_train.model.moe.balancing import AFTER_STEP, Balancer
from olmoe_train.model.moe.router_stats import RouterStats
from olmoe_train.training.batch import Batch, Totals, decoder_inputs
from olmoe_train.training.objectives.base import RouterSums

COUNTED_OVER_RANKS = ("all_ranks", "running", "global_batch")
"""Scopes for which the ranks add up the counts of a micro-batch; of the last one, if it is the whole step."""


class RouterTerms:
    """Adds what the balancer of a model computes to an objective's loss.

    A dense model (one expert) has no router losses: LB is constant there, and Z would pull at the hidden
    states. The same holds for frozen routers, next to an adapter: no loss can train them. Both report the
    terms, without a weight.

    A load-balancing loss that has no part in the gradient is measured over the whole step, when the last
    micro-batch has been counted; so it needs no pass of its own.
    """

    def __init__(self, model: OlmoeForCausalLM, device: torch.device) -> None:
        assert model.balancer is not None, "build_model sets the balancer"
        self.balancer: Balancer = model.balancer
        self.layers, self.experts = model.config.num_hidden_layers, model.config.num_experts
        self.device = device
        router = model.decoder_layers[0].mlp.gate.weight
        self.weighted = self.experts > 1 and router.requires_grad
        self.scope = self.balancer.scope if self.weighted else AFTER_STEP
        self.sums = RouterSums.zeros(self.layers, self.experts, device)
        self._probabilities_LE = torch.zeros_like(self.sums.counts_LE)
        self._scoped_counts_LE = torch.zeros_like(self.sums.counts_LE)
        self._step_counts_LE: Tensor | None = None
        self._count_all_ranks, self._logged = self.scope in COUNTED_OVER_RANKS, False
        self._micro_batches_left = 0

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
        self._probabilities_LE.zero_()
        self._scoped_counts_LE = torch.zeros_like(self._probabilities_LE)
        self._step_counts_LE, self._logged = None, logged
        self._micro_batches_left = len(micro_batches)
        self._count_all_ranks = self.scope in COUNTED_OVER_RANKS
        if self.scope == "global_batch" and len(micro_batches) > 1:
            self._count_all_ranks = False
            with torch.no_grad():
                for batch in micro_batches:
                    with within(batch):
                        self._scoped_counts_LE += model.training_forward(
                            **decoder_inputs(batch)
                        ).router.counts_LE
            dist.all_reduce(self._scoped_counts_LE)

    def add(self, loss: Tensor, stats: RouterStats, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the routers' share to the share of `loss`; also return the shares of the routers' terms.
        Collective.

        Args:
            loss: Share of one micro-batch in the objective's loss, a scalar.
            stats: Sums over the micro-batch.
            totals: Counts over the global batch.
        """
        share, terms = self.balancer.loss(stats, totals.num_tokens, self._counts(stats.counts_LE))
        self.sums.counts_LE += stats.counts_LE
        self.sums.entropy_L += stats.entropy_L / totals.num_tokens
        self.sums.z_L += stats.squared_logsumexp_L.detach() / totals.num_tokens
        self._probabilities_LE += stats.probabilities_LE.detach()
        self._micro_batches_left -= 1
        if self.scope == AFTER_STEP and self._logged and not self._micro_batches_left:
            step = stats._replace(counts_LE=self.sums.counts_LE, probabilities_LE=self._probabilities_LE)
            terms |= self.balancer.measure(step, totals.num_tokens, self._counts_of_step())
        return (loss + share if self.weighted else loss), terms

    def end_step(self, skipped: Tensor) -> None:
        """Let the balancer see the counts of the global batch. Collective if the balancer has a state.

        Args:
            skipped: bool scalar, whether the step's update was not applied.
        """
        if self.balancer.has_state:
            self.balancer.update(self._counts_of_step().masked_fill(skipped, 0))

    def _counts(self, counts_LE: Tensor) -> Tensor | None:
        """Expert counts of the tokens that the load-balancing loss of a micro-batch is about.

        Args:
            counts_LE: Those of the micro-batch.

        Returns:
            The counts. None: the loss is left out.
        """
        if self.scope == AFTER_STEP:
            return None
        if self.scope == "micro_batch":
            return counts_LE
        if self._count_all_ranks:
            of_ranks_LE = counts_LE.clone()
            dist.all_reduce(of_ranks_LE)
            # arXiv 2501.11873, algorithm 1: the counts add up until the step ends.
            before_LE = self._scoped_counts_LE if self.scope == "running" else 0.0
            self._scoped_counts_LE = before_LE + of_ranks_LE
        return self._scoped_counts_LE

    def _counts_of_step(self) -> Tensor:
        """Expert counts of the global batch, after the last micro-batch."""
        if self._step_counts_LE is None:
            self._step_counts_LE = self.sums.counts_LE.clone()
            dist.all_reduce(self._step_counts_LE)
        return self._step_counts_LE
