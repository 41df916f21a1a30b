"""Which experts of a model matter for the data that its routing was counted on: pure arithmetic on counts.

Shapes: E experts, K top-k, L layers.
"""

import numpy as np

from olmoe_train.config.choices import Relevance
from olmoe_train.reporting.router_analysis import Array
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
