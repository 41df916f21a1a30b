"""The router analyses of the OLMoE paper (arXiv 2409.02060, section 5 and appendix G), defined on counts.

Shapes: E experts, K top-k, L layers, V vocabulary, N domains.

docs/concepts/router-analyses.md states the definitions and what the released scripts do differently.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
ALL_PAIRS, NEIGHBORS = "all_pairs", "neighbors"
COACTIVATION_RULES = (ALL_PAIRS, NEIGHBORS)
DRAWN_EXPERTS = 16
"""Experts in the paper's pictures of co-activation (its caption says 32, and 16 are drawn)."""


def saturation(shared_L: Array, tokens: int, k: int) -> Array:
    """Router saturation (equation 5): mean over tokens of |experts now and in the reference| / k.

    Args:
        shared_L: Sum over tokens of the experts that are among the first k of both models.
        tokens: Number of tokens.
        k: Experts per token that are compared.

    Returns:
        Fractions, 0 to 1, per layer; k / E if both models route at random.
    """
    return shared_L / (tokens * k)


def coactivation(together_EE: Array, tokens_E: Array) -> Array:
    """Expert co-activation (equation 6): of the tokens of expert i, the share that has expert j, too.

    Args:
        together_EE: Tokens with both experts: of all pairs, or only of neighbors in the sorted top-k. The
            diagonal is ignored.
        tokens_E: Tokens of each expert.

    Returns:
        [E, E], row i over the tokens of i; 0 on the diagonal, and in the row of an expert without tokens.
    """
    share_EE = together_EE / np.maximum(tokens_E, 1)[:, None]
    np.fill_diagonal(share_EE, 0.0)
    return share_EE


def uniform_coactivation(rule: str, num_experts: int, top_k: int) -> float:
    """Co-activation of random routing: (K - 1) / (E - 1); of neighbors 2 (K - 1) / K / (E - 1)."""
    partners = top_k - 1 if rule == ALL_PAIRS else 2 * (top_k - 1) / top_k
    return partners / max(1, num_experts - 1)


def highest_pairs(share_EE: Array, count: int) -> list[tuple[int, int, float]]:
    """List the pairs of different experts with the highest co-activation: (i, j, share), highest first."""
    order = np.argsort(-share_EE, axis=None, kind="stable")
    pairs = ((int(at) // len(share_EE), int(at) % len(share_EE)) for at in order)
    different = [(i, j, float(share_EE[i, j])) for i, j in pairs if i != j]
    return different[:count]


def most_coactivated(share_EE: Array, count: int = DRAWN_EXPERTS) -> list[int]:
    """Choose experts greedily from the highest pairs, as the paper's pictures do.

    Args:
        share_EE: Co-activation.
        count: Number of experts; all of them, if there are fewer.

    Returns:
        The experts in the order in which they are met.
    """
    chosen: list[int] = []
    for i, j, _ in highest_pairs(share_EE, share_EE.size):
        chosen += [expert for expert in (i, j) if expert not in chosen]
    return (chosen or list(range(len(share_EE))))[:count]


def domain_specialization(counts_NLE: Array, tokens_N: Array) -> Array:
    """Domain specialization (equation 7): of the tokens of a domain, the share that goes to each expert.

    Args:
        counts_NLE: Tokens of each domain whose first k experts include the expert.
        tokens_N: Tokens of each domain.

    Returns:
        [N, L, E]; the sum over experts is k, and k / E is uniform.
    """
    return counts_NLE / np.maximum(tokens_N, 1)[:, None, None]


@dataclass(frozen=True)
class VocabularySpecialization:
    """Equation 8 in one layer, for one kind of token and one k."""

    mean: float
    """Mean over the token ids with at least min_count occurrences of the share that goes to each id's most
    frequent expert. NaN: there is no such id."""
    mean_of_all: float
    """The same over all ids that occur, as the released script computes it. An id that occurs once counts
    as 1."""
    expert_V: Array
    """int: most frequent expert of each token id; the lowest one if several are."""
    share_V: Array
    """Share of the id's occurrences that goes to that expert; 0 for an id that does not occur."""
    known_V: Array
    """bool: ids with at least min_count occurrences."""

    def by_expert(self, num_experts: int) -> Array:
        """Mean share over the ids whose most frequent expert each one is, [E]; NaN without such an id."""
        experts = self.expert_V[self.known_V]
        ids_E = np.bincount(experts, minlength=num_experts)
        sums_E = np.bincount(experts, weights=self.share_V[self.known_V], minlength=num_experts)
        return np.where(ids_E > 0, sums_E / np.maximum(ids_E, 1), np.nan)

    def ids_of(self, expert: int, occurrences_V: Array, count: int) -> Array:
        """The expert's token ids, highest share first, then the most frequent."""
        (ids,) = np.nonzero(self.known_V & (self.expert_V == expert))
        return ids[np.lexsort((-occurrences_V[ids], -self.share_V[ids]))][:count]


def vocabulary_specialization(
    counts_VE: Array, occurrences_V: Array, min_count: int
) -> VocabularySpecialization:
    """Vocabulary specialization (equation 8): share of a token id's occurrences that goes to each expert.

    The denominator is the number of occurrences, as in the released script. So the shares of an id sum to k
    over the experts, and each can reach 1.

    Args:
        counts_VE: Occurrences of each id whose first k experts include the expert.
        occurrences_V: Occurrences of each id.
        min_count: Least number of occurrences of an id in `mean`, and in what is said of experts.
    """
    expert_V = counts_VE.argmax(1)
    most_V = np.take_along_axis(counts_VE, expert_V[:, None], 1)[:, 0]
    share_V = most_V / np.maximum(occurrences_V, 1)
    known_V = occurrences_V >= max(1, min_count)
    return VocabularySpecialization(
        _mean(share_V[known_V]), _mean(share_V[occurrences_V > 0]), expert_V, share_V, known_V
    )


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")


@dataclass(frozen=True)
class ExpertImportance:
    """How much each expert contributes, [L, E] each."""

    frequency_LE: Array
    """Share of the tokens that activate the expert; the sum over experts is K."""
    mean_gate_LE: Array
    """Mean routing weight over the tokens that activate the expert; 0 for an expert without tokens."""
    mean_weighted_norm_LE: Array
    """Mean over the same tokens of routing weight x 2-norm of the expert's output: the criterion of REAP
    (arXiv 2510.13999) for pruning. 0 for an expert without tokens."""
    contribution_LE: Array
    """Share of the expert in the sum over tokens of routing weight x 2-norm; the shares of a layer sum to
    1."""


def expert_importance(
    counts_LE: Array, gates_LE: Array, weighted_norms_LE: Array, tokens: int
) -> ExpertImportance:
    """Importance of experts from sums over tokens.

    Args:
        counts_LE: Tokens that activate each expert.
        gates_LE: Sum of their routing weights.
        weighted_norms_LE: Sum of routing weight x 2-norm of the expert's output.
        tokens: Number of tokens.
    """
    at_least_one_LE = np.maximum(counts_LE, 1)
    totals_L1 = weighted_norms_LE.sum(-1, keepdims=True)
    return ExpertImportance(
        counts_LE / max(1, tokens),
        gates_LE / at_least_one_LE,
        weighted_norms_LE / at_least_one_LE,
        weighted_norms_LE / np.where(totals_L1 > 0, totals_L1, 1.0),
    )
