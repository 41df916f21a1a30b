"""Balancers: how the load of the experts is kept even.

Shapes: T tokens, E experts, L layers.

A balancer decides three things: the scores from which a router chooses its experts, what the routers add to
the loss, and what changes after a step. AuxiliaryLosses is the first balancer. A new one is a class with the
same methods; if the class keeps a state (a bias per expert, for example), it is an nn.Module with buffers and
a method `reset_buffers` that fills them.
"""

from enum import Enum
from typing import Protocol

from torch import Tensor

from olmoe_train.model.losses import router_losses_from_stats
from olmoe_train.model.moe.router_stats import RouterStats


class Balancer(Protocol):
    """What a model and an objective need of a balancer."""

    over_global_batch: bool
    """Whether `loss` needs the expert counts of the whole step, over all micro-batches and ranks."""
    has_state: bool
    """Whether `update` must be called after each step."""

    def needs_loss(self, logged: bool) -> bool:
        """Whether this step uses the value of the balancing loss. logged: whether the step is logged."""

    def scores(self, layer: int, probs_TE: Tensor) -> Tensor:
        """Scores of the experts [T, E], without gradient. Each token goes to the K highest.

        Args:
            layer: Index of the decoder layer.
            probs_TE: Softmax probabilities, fp32, without gradient. The weights of the experts' outputs stay
                these probabilities.
        """

    def loss(
        self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Share of one micro-batch in the routers' losses of the step.

        Args:
            stats: Sums over the micro-batch.
            total_tokens: Unpadded tokens of the global batch, a scalar.
            total_counts_LE: Expert counts of the global batch; None counts the micro-batch alone.

        Returns:
            (the weighted share, which has a gradient; the shares of the named terms, unweighted), scalars.
        """

    def update(self, counts_LE: Tensor) -> None:
        """Change the state after a step. Called on every rank with the same argument.

        Args:
            counts_LE: Expert counts of the global batch, fp32; zeros if the step was skipped.
        """


class AuxiliaryLosses:
    """The load-balancing loss and the router z-loss, each with its weight. There is no state."""

    has_state = False

    def __init__(
        self,
        top_k: float,
        load_balancing_coef: float,
        z_coef: float,
        convention: str | Enum = "olmoe",
        over_global_batch: bool = True,
    ) -> None:
        """
        Args:
            top_k: K, experts per token; a mean with expert choice.
            load_balancing_coef: Weight of the load-balancing loss.
            z_coef: Weight of the router z-loss.
            convention: How both losses are normalized; see model/losses.py.
            over_global_batch: Whether the load-balancing loss counts the whole step or each micro-batch.
        """
        self.top_k, self.convention = top_k, convention
        self.load_balancing_coef, self.z_coef = load_balancing_coef, z_coef
        self.over_global_batch = over_global_batch

    def needs_loss(self, logged: bool) -> bool:
        return logged or self.load_balancing_coef != 0

    def scores(self, layer: int, probs_TE: Tensor) -> Tensor:
        return probs_TE

    def loss(
        self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        balance, z_loss = router_losses_from_stats(
            stats, self.top_k, self.convention, total_tokens, total_counts_LE
        )
        weighted = self.load_balancing_coef * balance + self.z_coef * z_loss
        return weighted, {"load_balancing_loss": balance, "router_z_loss": z_loss}

    def update(self, counts_LE: Tensor) -> None:
        """Nothing changes."""
