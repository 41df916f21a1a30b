"""The losses and the metrics of preferences, from log-probabilities of completions.

Shapes: N pairs, or N completions with labels.

With s the summed log-probability of a completion, n its tokens and r the reference's sum:

  dpo       -log sigmoid(beta d), d = (s_w - r_w) - (s_l - r_l). arXiv 2305.18290, equation 7.
  dpo_norm  the same with s / n and r / n. open-instruct's dpo_norm, TRL's sigmoid_norm.
  ipo       (d - 1 / (2 beta))^2. arXiv 2310.12036, equation 17. d is of s / n and r / n as in TRL, or of the
            sums.
  simpo     -log sigmoid(beta (s_w / n_w - s_l / n_l) - gamma). arXiv 2405.14734, equation 6.
  orpo      -s_w / n_w - beta log sigmoid(log odds_w - log odds_l), where the log odds are
            s / n - log(1 - exp(s / n)). arXiv 2403.07691, equations 6 and 7.
  kto       For a wanted completion weight (1 - sigmoid(beta (s - r - z))), for an unwanted one
            weight (1 - sigmoid(beta (z - s + r))). arXiv 2402.01306, equations 7 and 8.

label_smoothing e of dpo, dpo_norm and simpo is that of conservative DPO: (1 - e) loss(x) + e loss(-x), where
x is the argument of the sigmoid.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from olmoe_train.config.choices import IpoLogProbs, PreferenceKind
from olmoe_train.config.objective import PreferenceConfig

PER_TOKEN = (PreferenceKind.dpo_norm, PreferenceKind.ipo, PreferenceKind.simpo, PreferenceKind.orpo)
"""Kinds whose loss divides by the number of tokens; for them the rewards per token are logged, too."""


@dataclass(frozen=True)
class Completions:
    """Log-probabilities of N completions."""

    sum_N: Tensor
    """s: summed over the tokens of each completion, in nats, fp64."""
    reference_N: Tensor
    """r: the same of the reference, without gradient; 0 if there is none."""
    tokens_N: Tensor
    """n: tokens of each completion, fp64."""

    @property
    def mean(self) -> Tensor:
        """s / n, [N]."""
        return self.sum_N / self.tokens_N

    @property
    def gain(self) -> Tensor:
        """s - r, [N]."""
        return self.sum_N - self.reference_N

    @property
    def mean_gain(self) -> Tensor:
        """(s - r) / n, [N]."""
        return self.gain / self.tokens_N

    def select(self, which: slice | Tensor) -> "Completions":
        """Some of the completions, by a slice or a bool mask."""
        return Completions(self.sum_N[which], self.reference_N[which], self.tokens_N[which])


def pair_losses(cfg: PreferenceConfig, chosen: Completions, rejected: Completions) -> Tensor:
    """Loss of each pair, fp64 [N], without the term of sft_weight.

    Args:
        cfg: Kind and coefficients; any kind but kto.
        chosen: The preferred completions.
        rejected: The other completions of the same prompts.
    """
    kind, beta = cfg.kind, cfg.beta
    if kind is PreferenceKind.dpo:
        return _smoothed(beta * (chosen.gain - rejected.gain), cfg.label_smoothing)
    if kind is PreferenceKind.dpo_norm:
        return _smoothed(beta * (chosen.mean_gain - rejected.mean_gain), cfg.label_smoothing)
    if kind is PreferenceKind.ipo:
        summed = cfg.ipo_log_probs is IpoLogProbs.summed
        sides = (chosen.gain, rejected.gain) if summed else (chosen.mean_gain, rejected.mean_gain)
        return (sides[0] - sides[1] - 1 / (2 * beta)).square()
    if kind is PreferenceKind.simpo:
        margin_N = beta * (chosen.mean - rejected.mean)
        return _smoothed(margin_N, cfg.label_smoothing, cfg.gamma)
    assert kind is PreferenceKind.orpo, "kto has no pairs"
    return -chosen.mean - beta * F.logsigmoid(log_odds_ratio(chosen, rejected))


def _smoothed(x_N: Tensor, smoothing: float, gamma: float = 0.0) -> Tensor:
    """(1 - e) (-log sigmoid(x - gamma)) + e (-log sigmoid(gamma - x)), fp64 [N]."""
    loss_N = -(1 - smoothing) * F.logsigmoid(x_N - gamma)
    return loss_N - smoothing * F.logsigmoid(gamma - x_N) if smoothing else loss_N


def log_odds_ratio(chosen: Completions, rejected: Completions) -> Tensor:
    """log(odds_w / odds_l) of the mean log-probabilities, fp64 [N]."""
    return _log_odds(chosen.mean) - _log_odds(rejected.mean)


def _log_odds(log_p_N: Tensor) -> Tensor:
    """log(p / (1 - p)). log1p(-p) would lose all digits where p is close to 1 (log p > -log 2)."""
    # At p = 1 the odds are infinite; the largest log p below 0 keeps loss and gradient finite.
    log_p_N = log_p_N.clamp(max=-torch.finfo(log_p_N.dtype).eps)
    return log_p_N - (-torch.expm1(log_p_N)).log()


def kto_losses(cfg: PreferenceConfig, completions: Completions, wanted_N: Tensor, z: Tensor) -> Tensor:
    """Loss of each completion, fp64 [N].

    Args:
        cfg: beta and the two weights.
        completions: Of any labels.
        wanted_N: bool, the labels.
        z: Estimate of the KL divergence, a scalar without gradient.
    """
    sign_N = torch.where(wanted_N, 1.0, -1.0)
    weight_N = torch.where(wanted_N, cfg.desirable_weight, cfg.undesirable_weight)
    return weight_N * (1 - torch.sigmoid(cfg.beta * sign_N * (completions.gain - z)))


@torch.no_grad()
def pair_metrics(cfg: PreferenceConfig, chosen: Completions, rejected: Completions) -> dict[str, Tensor]:
    """Metrics of each pair, fp64 [N], under TRL's names. Rewards are beta (s - r).

    In rewards/accuracies a tie counts as half. For kinds that divide by the number of tokens, metrics with
    _per_token in their name are of s / n and r / n.
    """
    values = _side_metrics(cfg.beta, chosen.gain, rejected.gain, chosen.sum_N, rejected.sum_N, "")
    if cfg.kind in PER_TOKEN:
        values |= _side_metrics(
            cfg.beta, chosen.mean_gain, rejected.mean_gain, chosen.mean, rejected.mean, "_per_token"
        )
    if cfg.kind is PreferenceKind.orpo:
        ratio_N = log_odds_ratio(chosen, rejected)
        values |= {"nll_loss": -chosen.mean, "log_odds_chosen": ratio_N}
        values["log_odds_ratio"] = F.logsigmoid(ratio_N)
    return values


def _side_metrics(
    beta: float, gain_w_N: Tensor, gain_l_N: Tensor, log_w_N: Tensor, log_l_N: Tensor, suffix: str
) -> dict[str, Tensor]:
    chosen_N, rejected_N = beta * gain_w_N, beta * gain_l_N
    return {
        f"rewards{suffix}/chosen": chosen_N,
        f"rewards{suffix}/rejected": rejected_N,
        f"rewards{suffix}/margins": chosen_N - rejected_N,
        f"rewards{suffix}/accuracies": (1 + torch.sign(chosen_N - rejected_N)) / 2,
        f"logps{suffix}/chosen": log_w_N,
        f"logps{suffix}/rejected": log_l_N,
    }


@torch.no_grad()
def kto_metrics(
    cfg: PreferenceConfig, completions: Completions, wanted_N: Tensor, labels_2: Tensor
) -> dict[str, Tensor]:
    """TRL's metrics of kto: means over the wanted and over the unwanted completions of a set.

    Args:
        cfg: beta.
        completions: A part of the set.
        wanted_N: bool, the labels.
        labels_2: Numbers of unwanted and wanted completions of the whole set.

    Returns:
        The part's share of each mean: the shares of all parts add up to it. NaN if the set has no completion
        of the label. rewards/margins is the difference of the two means.
    """
    values = {"rewards": cfg.beta * completions.gain, "logps": completions.sum_N}
    shares = {
        f"{name}/{side}": torch.where(wanted_N == wanted, value_N, 0.0).sum() / labels_2[int(wanted)]
        for name, value_N in values.items()
        for side, wanted in (("chosen", True), ("rejected", False))
    }
    shares["rewards/margins"] = shares["rewards/chosen"] - shares["rewards/rejected"]
    return shares
