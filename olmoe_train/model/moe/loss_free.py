"""Balancing without a balancing loss: a bias per expert in the choice of experts (arXiv 2408.15664).

Shapes: T tokens, E experts, L layers.
"""

from typing import cast

import torch
from torch import Tensor, nn

from olmoe_train.model.moe.balancing import AuxiliaryLosses
from olmoe_train.model.moe.router_stats import RouterStats

BIAS = "balancer.bias_LE"
"""Name of the bias in a model's state, and so in a checkpoint."""


class LossFreeBias(nn.Module):
    """Adds a bias to the probabilities from which top-k chooses (section 3 of the paper). The
    weights of the experts' outputs stay the probabilities.

    After each step, b += rate x sign(mean load - load), with the load over the global batch (algorithm 1).
    The paper has sigmoid scores; OLMoE's are a softmax over all experts.
    """

    has_state = True

    def __init__(self, layers: int, experts: int, rate: float, losses: AuxiliaryLosses) -> None:
        """
        Args:
            layers: L.
            experts: E.
            rate: Change of a bias per step, in units of probability.
            losses: The z-loss, and possibly the sequence-wise loss; without a load-balancing loss.
        """
        super().__init__()
        self.rate, self.losses = rate, losses
        self.scope, self.per_sequence = losses.scope, losses.per_sequence
        self.register_buffer("bias_LE", torch.zeros(layers, experts))

    @property
    def bias(self) -> Tensor:
        """The bias, fp32 [L, E]."""
        return cast(Tensor, self.bias_LE)

    def reset_buffers(self) -> None:
        self.bias.zero_()

    def scores(self, layer: int, probs_TE: Tensor) -> Tensor:
        return probs_TE + self.bias[layer]

    def loss(
        self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses.loss(stats, total_tokens, total_counts_LE)

    def measure(self, stats: RouterStats, total_tokens: Tensor, total_counts_LE: Tensor) -> dict[str, Tensor]:
        return self.losses.measure(stats, total_tokens, total_counts_LE)

    def update(self, counts_LE: Tensor) -> None:
        """Zeros, the counts of a skipped step, change nothing: no expert is above or below the mean."""
        mean_L1 = counts_LE.mean(-1, keepdim=True)
        self.bias.add_(self.rate * (mean_L1 - counts_LE).sign())


def fixed_bias(bias_LE: Tensor, top_k: int) -> LossFreeBias:
    """The balancer of a model that is only evaluated: it chooses with a bias that does not change."""
    layers, experts = bias_LE.shape
    balancer = LossFreeBias(layers, experts, 0.0, AuxiliaryLosses(top_k, 0.0, 0.0))
    balancer.bias.copy_(bias_LE)
    return balancer
