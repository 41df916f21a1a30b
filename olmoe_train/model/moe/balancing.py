"""Balancers: how the load of the experts is kept even.

Shapes: T tokens, E experts, L layers.

A balancer decides three things: the scores from which a router chooses its experts, what the routers add to
the loss, and what changes after a step. AuxiliaryLosses is the first balancer, and loss_free.py has one with
a state. A new one is a class with the same methods; if the class keeps a state (a bias per expert, for
example), it is an nn.Module with buffers and a method `reset_buffers` that fills them.
"""

from collections.abc import Iterable
from enum import Enum
from typing import Protocol

from torch import Tensor

from olmoe_train.model.losses import router_losses_from_stats, sequence_balancing_loss
from olmoe_train.model.moe.block import OlmoeSparseMoeBlock
from olmoe_train.model.moe.router_stats import RouterStats

AFTER_STEP = "after_step"
"""Balancer.scope of a loss that has no load-balancing loss: its value is measured when the step is known."""
SCOPES = ("micro_batch", "all_ranks", "running", "global_batch", AFTER_STEP)
"""Values of Balancer.scope; config.choices.BalanceScope says what the others mean."""


class Balancer(Protocol):
    """What a model and an objective need of a balancer."""

    scope: str
    """Tokens whose expert counts `loss` gets: one of SCOPES."""
    per_sequence: bool
    """Whether `loss` needs RouterStats.sequence_products_L."""
    has_state: bool
    """Whether `update` must be called after each step."""

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
            total_counts_LE: Expert counts of the tokens of `scope`. None: the load-balancing loss is left
                out, because it cannot train the routers, or the scope is AFTER_STEP.

        Returns:
            (the weighted share, which has a gradient; the shares of the named terms, unweighted), scalars.
        """

    def measure(self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor) -> dict[str, Tensor]:
        """Share of one rank in the terms that `loss` leaves out without counts.

        Args:
            stats: Sums over the rank's part of the step, without gradient.
            total_tokens: Unpadded tokens of the global batch, a scalar.
            total_counts_LE: Expert counts of the global batch.

        Returns:
            The shares by name, unweighted, scalars.
        """

    def update(self, counts_LE: Tensor) -> None:
        """Change the state after a step. Called on every rank with the same argument.

        Args:
            counts_LE: Expert counts of the global batch, fp32; zeros if the step was skipped.
        """


class AuxiliaryLosses:
    """The load-balancing loss, the sequence-wise loss and the router z-loss, each with its weight. There is
    no state."""

    has_state = False

    def __init__(
        self,
        top_k: float,
        load_balancing_coef: float,
        z_coef: float,
        convention: str | Enum = "olmoe",
        scope: str | Enum = "global_batch",
        sequence_coef: float = 0.0,
    ) -> None:
        """
        Args:
            top_k: K, experts per token; a mean with expert choice.
            load_balancing_coef: Weight of the load-balancing loss.
            z_coef: Weight of the router z-loss.
            convention: How the losses are normalized; see model/losses.py.
            scope: Tokens whose expert counts enter the load-balancing loss.
            sequence_coef: Weight of the sequence-wise loss.
        """
        self.top_k, self.convention = top_k, convention
        self.load_balancing_coef, self.z_coef, self.sequence_coef = load_balancing_coef, z_coef, sequence_coef
        name = scope.value if isinstance(scope, Enum) else scope
        self.scope = name if load_balancing_coef else AFTER_STEP
        assert self.scope in SCOPES, self.scope
        self.per_sequence = sequence_coef != 0

    def scores(self, layer: int, probs_TE: Tensor) -> Tensor:
        return probs_TE

    def loss(
        self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        balance, z_loss = router_losses_from_stats(
            stats, self.top_k, self.convention, total_tokens, total_counts_LE
        )
        weighted, terms = self.z_coef * z_loss, {"router_z_loss": z_loss}
        if total_counts_LE is not None:
            weighted, terms = (
                self.load_balancing_coef * balance + weighted,
                {"load_balancing_loss": balance} | terms,
            )
        if self.per_sequence:
            of_sequences = sequence_balancing_loss(stats, self.top_k, self.convention, total_tokens)
            weighted = weighted + self.sequence_coef * of_sequences
            terms["sequence_balancing_loss"] = of_sequences
        return weighted, terms

    def measure(self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor) -> dict[str, Tensor]:
        balance, _ = router_losses_from_stats(
            stats, self.top_k, self.convention, total_tokens, total_counts_LE
        )
        return {"load_balancing_loss": balance}

    def update(self, counts_LE: Tensor) -> None:
        """Nothing changes."""


def set_router_options(blocks: Iterable[OlmoeSparseMoeBlock], temperature: float, jitter: float) -> None:
    """Set the options of every router, before activation checkpointing; see OlmoeTopKRouter.

    Args:
        blocks: The MoE blocks of a model.
        temperature: Divisor of the logits, above 0.
        jitter: Largest relative change of the input in training, in [0, 1).
    """
    for block in blocks:
        block.gate.temperature, block.gate.jitter = temperature, jitter
