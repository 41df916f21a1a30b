"""The losses and metrics of preferences against numbers worked by hand.

Shapes: N pairs or completions.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from olmoe_train.config.choices import IpoLogProbs, PreferenceKind
from olmoe_train.config.objective import PreferenceConfig
from olmoe_train.training.objectives.preference_losses import (
    PER_TOKEN,
    Completions,
    kto_losses,
    kto_metrics,
    pair_losses,
    pair_metrics,
)


def completions(
    sums: Sequence[float],
    references: Sequence[float],
    tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Completions:
    columns: list[Tensor] = [torch.tensor(column, dtype=dtype) for column in (sums, references, tokens)]
    return Completions(*columns)


# s - r is 2 and -5, (s - r) / n is 0.5 and -0.5, s / n is -2.5 and -2.
CHOSEN = ([-10.0], [-12.0], [4])
REJECTED = ([-20.0], [-15.0], [10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        # -log sigmoid(0.1 * 7) = log(1 + exp(-0.7)); smoothing adds e x.
        (PreferenceConfig(kind=PreferenceKind.dpo), 0.403186),
        (PreferenceConfig(kind=PreferenceKind.dpo, label_smoothing=0.1), 0.403186 + 0.07),
        # x = 5 * (0.5 + 0.5).
        (PreferenceConfig(kind=PreferenceKind.dpo_norm, beta=5), 0.006715),
        (PreferenceConfig(kind=PreferenceKind.dpo_norm, beta=5, label_smoothing=0.2), 0.006715 + 1.0),
        # 1 / (2 beta) = 5: (1 - 5)^2 per token and (7 - 5)^2 summed.
        (PreferenceConfig(kind=PreferenceKind.ipo), 16.0),
        (PreferenceConfig(kind=PreferenceKind.ipo, ipo_log_probs=IpoLogProbs.summed), 4.0),
        # x - gamma = 2 * (-2.5 + 2) - gamma: -1 without a margin, -1.5 with the margin 0.5.
        (PreferenceConfig(kind=PreferenceKind.simpo, beta=2, gamma=0), 1.313262),
        (PreferenceConfig(kind=PreferenceKind.simpo, beta=2, gamma=0.5), 1.701413),
        (PreferenceConfig(kind=PreferenceKind.simpo, beta=2, label_smoothing=0.1), 1.701413 - 0.15),
    ],
)
def test_loss_of_a_pair(cfg: PreferenceConfig, expected: float, dtype: torch.dtype) -> None:
    loss_N = pair_losses(cfg, completions(*CHOSEN, dtype), completions(*REJECTED, dtype))
    assert loss_N.dtype == dtype
    assert loss_N.item() == pytest.approx(expected, abs=1e-6)


def test_dpo_of_the_reference_itself_is_log_2() -> None:
    chosen, rejected = completions([-9.0], [-9.0], [3]), completions([-70.0], [-70.0], [50])
    for kind in (PreferenceKind.dpo, PreferenceKind.dpo_norm):
        loss_N = pair_losses(PreferenceConfig(kind=kind), chosen, rejected)
        assert loss_N.item() == pytest.approx(math.log(2), abs=1e-6)


def test_orpo_of_probabilities_a_half_and_a_fifth() -> None:
    # Odds 1 and 1/4: the ratio is 4, its sigmoid of the logarithm 4/5. NLL = log 2, from 3 tokens of 1/2.
    chosen = completions([3 * math.log(0.5)], [0.0], [3])
    rejected = completions([2 * math.log(0.2)], [0.0], [2])
    cfg = PreferenceConfig(kind=PreferenceKind.orpo, beta=0.1)
    expected = math.log(2) - 0.1 * math.log(0.8)
    assert pair_losses(cfg, chosen, rejected).item() == pytest.approx(expected, abs=1e-6)
    metrics = pair_metrics(cfg, chosen, rejected)
    assert metrics["nll_loss"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["log_odds_chosen"].item() == pytest.approx(math.log(4), abs=1e-6)
    assert metrics["log_odds_ratio"].item() == pytest.approx(math.log(0.8), abs=1e-6)


@pytest.mark.parametrize("log_p", [-1e-4, -1e-6, -1e-12, 0.0])
def test_orpo_is_finite_and_precise_where_the_probability_is_near_one(log_p: float) -> None:
    # 1 - exp(-1e-12) is 0 in fp32, so a plain log(1 - p) is -inf and its gradient NaN.
    sum_N = torch.tensor([log_p], requires_grad=True)
    rejected = completions([-1.0], [0.0], [1])
    for side in ("chosen", "rejected"):
        near_one = Completions(sum_N, torch.zeros(1), torch.ones(1))
        sides = (near_one, rejected) if side == "chosen" else (rejected, near_one)
        loss_N = pair_losses(PreferenceConfig(kind=PreferenceKind.orpo, beta=1.0), *sides)
        (gradient_N,) = torch.autograd.grad(loss_N.sum(), sum_N)
        assert loss_N.isfinite().all()
        assert gradient_N.isfinite().all()
        if log_p <= -1e-6:
            odds = [math.log(math.exp(p) / -math.expm1(p)) for p in (log_p, -1.0)]
            ratio = odds[0] - odds[1] if side == "chosen" else odds[1] - odds[0]
            nll = -log_p if side == "chosen" else 1.0
            assert loss_N.item() == pytest.approx(nll + math.log1p(math.exp(-ratio)), rel=1e-5)


def test_kto_of_both_labels_with_weights_and_z() -> None:
    # z = 1: wanted 2 (1 - sigmoid(0.1 (2 - 1))), unwanted 0.5 (1 - sigmoid(0.1 (1 + 5))).
    both = completions([-10.0, -20.0], [-12.0, -15.0], [4, 10])
    cfg = PreferenceConfig(kind=PreferenceKind.kto, desirable_weight=2, undesirable_weight=0.5)
    loss_N = kto_losses(cfg, both, torch.tensor([True, False]), torch.tensor(1.0))
    assert loss_N.tolist() == pytest.approx([2 * 0.475021, 0.5 * 0.354344], abs=1e-6)


def test_rewards_are_of_the_sums_and_ties_count_as_half() -> None:
    # Pairs: won, lost, tied. Rewards are 0.1 (s - r).
    chosen = completions([-10.0, -8.0, -6.0], [-12.0, -7.0, -5.0], [4, 2, 2])
    rejected = completions([-20.0, -9.0, -3.0], [-15.0, -9.0, -2.0], [10, 3, 1])
    metrics = pair_metrics(PreferenceConfig(), chosen, rejected)
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]
    assert metrics["rewards/chosen"].tolist() == pytest.approx([0.2, -0.1, -0.1])
    assert metrics["rewards/rejected"].tolist() == pytest.approx([-0.5, 0.0, -0.1])
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.7, -0.1, 0.0])
    assert metrics["logps/chosen"].tolist() == [-10.0, -8.0, -6.0]
    assert metrics["logps/rejected"].tolist() == [-20.0, -9.0, -3.0]


def test_metrics_per_token_exist_only_for_kinds_that_divide_by_the_tokens() -> None:
    chosen, rejected = completions(*CHOSEN), completions(*REJECTED)
    for kind in set(PreferenceKind) - {PreferenceKind.kto}:
        metrics = pair_metrics(PreferenceConfig(kind=kind, beta=2), chosen, rejected)
        assert metrics["rewards/chosen"].item() == 4.0, kind
        names = {name for name in metrics if "_per_token" in name}
        assert bool(names) == (kind in PER_TOKEN), kind
        if names:
            assert len(names) == 6
            assert metrics["rewards_per_token/chosen"].item() == 1.0
            assert metrics["logps_per_token/rejected"].item() == -2.0


def test_shares_of_kto_metrics_add_up_to_the_means_of_each_label() -> None:
    # Wanted: rewards 0.1 (2, -1), mean 0.05. Unwanted: 0.1 * -5. Margin 0.55.
    whole = completions([-10.0, -20.0, -8.0], [-12.0, -15.0, -7.0], [4, 10, 2])
    wanted_N, labels_2 = torch.tensor([True, False, True]), torch.tensor([1.0, 2.0])
    cfg = PreferenceConfig(kind=PreferenceKind.kto)
    parts = [kto_metrics(cfg, whole.select(at), wanted_N[at], labels_2) for at in (slice(1), slice(1, 3))]
    total = {name: (parts[0][name] + parts[1][name]).item() for name in parts[0]}
    assert total == pytest.approx(
        {
            "rewards/chosen": 0.05,
            "rewards/rejected": -0.5,
            "rewards/margins": 0.55,
            "logps/chosen": -9.0,
            "logps/rejected": -20.0,
        }
    )


def test_kto_metrics_of_a_label_that_does_not_occur_are_nan() -> None:
    both = completions([-10.0, -8.0], [-12.0, -7.0], [4, 2])
    cfg = PreferenceConfig(kind=PreferenceKind.kto)
    metrics = kto_metrics(cfg, both, torch.tensor([True, True]), torch.tensor([0.0, 2.0]))
    assert metrics["rewards/chosen"].item() == pytest.approx(0.05)
    assert metrics["rewards/rejected"].isnan()
    assert metrics["logps/rejected"].isnan()
    assert metrics["rewards/margins"].isnan()
