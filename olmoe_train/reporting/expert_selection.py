"""Which experts of a model matter for the data that its routing was counted on: pure arithmetic on counts.

Shapes: E experts, K top-k, L layers.
"""

import numpy as np

from olmoe_train.config.choices import PruneBy, Relevance
from olmoe_train.reporting.router_analysis import Array, expert_importance
from olmoe_train.reporting.routing_counts import RoutingCounts

ROUNDING = 1e-12
"""What a sum of shares may lack of p by rounding."""


def relevance(counts: RoutingCounts, select: Relevance) -> Array:
    """Relevance of each expert to the data (ESFT, arXiv 2407.01906, equations 6 and 7).

    token: token selection ratio, the mean over tokens of 1 / K for each of the K chosen experts. gate:
    average gate score, the mean over tokens of the routing weights of the chosen experts, divided by its sum
    over the experts, so that p means the same for both. The mean over samples of their means is the mean over
    tokens, because samples have one length.

    Returns:
        fp64 [L, E]; the sum over experts is 1.
    """
    sums_LE = counts.tokens_per_expert if select is Relevance.token else counts.gates_LE
    shares_LE: Array = (sums_LE.double() / sums_LE.double().sum(-1, keepdim=True)).numpy()
    return shares_LE


def smallest_sets(relevance_LE: Array, p: float) -> list[list[int]]:
    """For each layer the smallest set of experts whose relevance sums to `p` or more (equation 8).

    Returns:
        Experts of each layer, the most relevant first; of equally relevant ones the lowest first.
    """
    sets = []
    for relevance_E in relevance_LE:
        order = np.argsort(-relevance_E, kind="stable")
        reached = np.cumsum(relevance_E[order]) >= p - ROUNDING
        sets.append([int(expert) for expert in order[: int(reached.argmax()) + 1]])
    return sets


def saliency(counts: RoutingCounts, by: PruneBy) -> Array:
    """What an expert is worth to the data, by which experts are kept.

    frequency: tokens that activate the expert. reap: mean over these tokens of routing weight x 2-norm of the
    expert's output (REAP, arXiv 2510.13999); 0 for an expert without tokens.

    Returns:
        fp64 [L, E].
    """
    found = expert_importance(
        counts.tokens_per_expert.numpy(),
        counts.gates_LE.numpy(),
        counts.weighted_norms_LE.numpy(),
        int(counts.tokens_N.sum()),
    )
    return found.frequency_LE if by is PruneBy.frequency else found.mean_weighted_norm_LE


def best_experts(saliency_LE: Array, keep: int) -> list[list[int]]:
    """The `keep` experts of each layer with the highest saliency, in the order of the model; of equal ones
    the lowest."""
    return [sorted(map(int, np.argsort(-of_layer, kind="stable")[:keep])) for of_layer in saliency_LE]


def removed_shares(counts: RoutingCounts, kept_LN: list[list[int]]) -> tuple[Array, Array]:
    """What pruning takes away from each layer.

    Returns:
        (share of the tokens' choices of experts, mean over tokens of the probability), [L] each.
    """
    is_kept_LE = np.zeros(counts.gates_LE.shape, dtype=bool)
    for is_kept_E, kept in zip(is_kept_LE, kept_LN, strict=True):
        is_kept_E[kept] = True
    shares = []
    for sums_LE in (counts.tokens_per_expert.numpy(), counts.probabilities_LE.numpy()):
        shares.append(np.where(is_kept_LE, 0, sums_LE).sum(-1) / sums_LE.sum(-1))
    return shares[0], shares[1]
