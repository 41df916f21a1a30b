"""The definitions of the router analyses, in closed form and on the counts of the released model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from olmoe_train.reporting.router_analysis import (
    ALL_PAIRS,
    NEIGHBORS,
    coactivation,
    domain_specialization,
    expert_importance,
    highest_pairs,
    most_coactivated,
    saturation,
    uniform_coactivation,
    vocabulary_specialization,
)
from olmoe_train.reporting.routing_counts import count_experts, count_neighbors, count_pairs, count_shared

COUNTS = json.loads((Path(__file__).parents[1] / "support/olmoe_0924_expert_counts.json").read_text())
T, E, K = 50_000, 64, 8
# Domain -> layer -> (expert, per cent of the domain's tokens): the paper's figure 22, k = 8.
PUBLISHED = {
    "github": {"0": [(21, 62.6)], "7": [(17, 77.0), (2, 75.6), (4, 65.7)], "15": [(30, 56.4)]},
    "arxiv": {"0": [(0, 97.7)], "7": [(17, 78.5), (4, 73.5)], "15": [(17, 93.7)]},
    "wikipedia": {"0": [(11, 77.2)], "7": [(27, 84.8)], "15": [(36, 58.1)]},
    "book": {"0": [(28, 45.4)], "7": [(28, 50.7)], "15": [(45, 36.6)]},
    "c4": {"0": [(41, 37.7)], "7": [(1, 33.2)], "15": [(7, 31.2)]},
}


def random_routing(seed: int) -> torch.Tensor:
    """Experts of T tokens, int64 [1, T, K], each choice equally probable."""
    return torch.rand(T, E, generator=torch.Generator().manual_seed(seed)).topk(K).indices[None]


def test_domain_specialization_of_the_released_model_is_the_published_one() -> None:
    layers = ("0", "7", "15")
    for domain, published in PUBLISHED.items():
        counts_LE = np.array([COUNTS["counts"][domain][layer] for layer in layers])
        tokens = counts_LE[0].sum() // COUNTS["top_k"]
        assert tokens == 102 * 2048
        (shares_LE,) = domain_specialization(counts_LE[None], np.array([tokens]))
        np.testing.assert_allclose(shares_LE.sum(-1), COUNTS["top_k"])  # rows of equation 7 sum to k
        for layer, shares_E in zip(layers, shares_LE, strict=True):
            highest = np.argsort(-shares_E)[: len(published[layer])]
            assert [(int(one), round(100 * shares_E[one], 1)) for one in highest] == published[layer]


def test_saturation_of_identical_disjoint_and_random_routing() -> None:
    mine, other = random_routing(0), random_routing(1)

    def value(theirs: torch.Tensor, k: int = K) -> float:
        shared_L = count_shared(mine[..., :k], theirs[..., :k]).numpy()
        return float(saturation(shared_L, T, k)[0])

    assert value(mine) == value(mine.flip(-1)) == 1  # the order of the experts does not count
    assert value(mine + E) == 0
    assert value(other) == pytest.approx(K / E, abs=0.01)
    assert value(other, 1) == pytest.approx(1 / E, abs=0.01)


def test_coactivation_of_two_experts_always_together_and_of_random_routing() -> None:
    # Expert 0 always comes with expert 2; expert 2 also comes with 1. Expert 3 has no token.
    indices_TK = torch.tensor([[0, 2], [2, 0], [2, 1], [1, 2]])
    pairs_EE = count_pairs(indices_TK, 4).numpy()
    share_EE = coactivation(pairs_EE, pairs_EE.diagonal())
    np.testing.assert_allclose(
        share_EE, np.array([[0, 0, 1, 0], [0, 0, 1, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    )
    assert highest_pairs(share_EE, 2) == [(0, 2, 1.0), (1, 2, 1.0)]
    assert most_coactivated(share_EE, 3) == [0, 2, 1]

    (random_TK,) = random_routing(2)
    tokens_E = count_experts(random_TK[None], E)[0].numpy()
    off_diagonal = ~np.eye(E, dtype=bool)
    for rule, count, uniform in (
        (ALL_PAIRS, count_pairs, 7 / 63),
        (NEIGHBORS, count_neighbors, 1.75 / 63),
    ):
        share_EE = coactivation(count(random_TK, E).numpy(), tokens_E)
        assert uniform_coactivation(rule, E, K) == pytest.approx(uniform)
        assert share_EE[off_diagonal].mean() == pytest.approx(uniform, rel=1e-3)
        assert share_EE[off_diagonal].std() < 0.01


def test_vocabulary_and_its_least_count() -> None:
    # Id 0 goes to expert 1 in 9 of 12 cases; id 1 occurs once; id 2 never; id 3 goes to expert 1 always.
    counts_VE = np.array([[3, 9], [1, 0], [0, 0], [0, 4]])
    found = vocabulary_specialization(counts_VE, counts_VE.sum(1), min_count=4)
    assert found.mean == (0.75 + 1) / 2
    assert found.mean_of_all == pytest.approx((0.75 + 1 + 1) / 3)
    np.testing.assert_array_equal(found.by_expert(2), [np.nan, 0.875])
    assert found.ids_of(1, counts_VE.sum(1), 5).tolist() == [3, 0]
    assert np.isnan(vocabulary_specialization(counts_VE, counts_VE.sum(1), min_count=13).mean)


def test_importance_of_an_expert_without_tokens_is_zero() -> None:
    found = expert_importance(np.array([[4, 0]]), np.array([[2.0, 0.0]]), np.array([[6.0, 0.0]]), 4)
    assert found.frequency_LE.tolist() == [[1, 0]]
    assert found.mean_gate_LE.tolist() == [[0.5, 0]]
    assert found.mean_weighted_norm_LE.tolist() == [[1.5, 0]]
    assert found.contribution_LE.tolist() == [[1, 0]]
