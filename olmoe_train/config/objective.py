"""The options of `objective`: one dataclass per training objective."""

from dataclasses import dataclass

from olmoe_train.config.choices import IpoLogProbs, PreferenceKind, Reference
from olmoe_train.config.variants import VariantConfig, register_variant


@dataclass(frozen=True)
class ObjectiveConfig(VariantConfig):
    """What every objective has."""

    @property
    def sequences_per_sample(self) -> int:
        """Sequences that a sample of trainer.global_batch_size has at most."""
        return 1


@dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy of the next token, for pretraining and supervised fine-tuning."""

    name: str = "next_token"


@dataclass(frozen=True)
class PreferenceConfig(ObjectiveConfig):
    """Preference tuning on pairs of completions, or for kto on completions with labels (data=preference).

    trainer.global_batch_size and trainer.micro_batch_size count pairs; for kto they count completions.
    """

    name: str = "preference"
    kind: PreferenceKind = PreferenceKind.dpo
    """Loss of a pair. With s the summed log-probability of a completion, n its tokens, r the reference's sum,
    w the chosen and l the rejected completion, and d = (s_w - r_w) - (s_l - r_l). dpo: -log sigmoid(beta d).
    dpo_norm: the same with s / n and r / n. ipo: (d - 1 / (2 beta))^2, with ipo_log_probs. simpo: -log
    sigmoid(beta (s_w / n_w - s_l / n_l) - gamma). orpo: -s_w / n_w - beta log sigmoid(log odds ratio). kto:
    of single completions, 1 - sigmoid(beta (s - r - z)) for wanted and 1 - sigmoid(beta (z - s + r)) for
    unwanted ones, where z estimates the KL divergence over the global batch."""
    beta: float = 0.1
    """Strength of the pull to the reference; for simpo, the scale of the rewards; for orpo, the weight of the
    odds ratio."""
    gamma: float = 0.5
    """Margin between the scaled rewards of simpo."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose two sides are exchanged, 0 to 0.5: (1 - e) loss + e loss of the exchanged
    pair (conservative DPO). For dpo, dpo_norm and simpo."""
    sft_weight: float = 0.0
    """Weight of an added term, the mean over pairs of -s_w / n_w. Not for orpo, which has this term, and
    kto."""
    desirable_weight: float = 1.0
    """Weight of the wanted completions of kto."""
    undesirable_weight: float = 1.0
    """Weight of the unwanted completions of kto."""
    ipo_log_probs: IpoLogProbs = IpoLogProbs.per_token
    """What d is made of in ipo. per_token: s / n and r / n, as in TRL. summed: s and r, as in the paper
    (arXiv 2310.12036)."""
    reference: Reference | None = None
    """Where r comes from. cached: computed once with the initial weights, before the first step, and stored.
    live: a second, frozen model, or the model without its adapter, in every step. none: no reference, for
    simpo and orpo. null: cached; none for simpo and orpo."""
    logprobs_dir: str | None = None
    """Directory of the cached log-probabilities, which `olmoe logprobs` or the run writes; null:
    run_dir/logprobs."""

    @property
    def sequences_per_sample(self) -> int:
        return 1 if self.kind is PreferenceKind.kto else 2

    @property
    def has_reference(self) -> bool:
        """Whether the kind compares with a reference."""
        return self.kind not in (PreferenceKind.simpo, PreferenceKind.orpo)

    @property
    def reference_kind(self) -> Reference:
        """`reference`, with the default of the kind."""
        default = Reference.cached if self.has_reference else Reference.none
        return default if self.reference is None else self.reference

    def errors(self) -> list[str]:
        errors = [] if self.beta > 0 else [f"objective.beta={self.beta}: must be positive"]
        if not 0 <= self.label_smoothing < 0.5:
            errors.append(
                f"objective.label_smoothing={self.label_smoothing}: must be at least 0 and below 0.5"
            )
        for key in ("sft_weight", "desirable_weight", "undesirable_weight"):
            if getattr(self, key) < 0:
                errors.append(f"objective.{key}={getattr(self, key)}: must not be negative")
        if self.reference is Reference.none and self.has_reference:
            errors.append(
                f"objective.reference=none: objective.kind={self.kind.value} compares with a reference; set "
                "objective.reference=cached or live"
            )
        if self.reference in (Reference.cached, Reference.live) and not self.has_reference:
            errors.append(
                f"objective.reference={self.reference.value}: objective.kind={self.kind.value} has no "
                "reference; set objective.reference=none"
            )
        return errors


register_variant("objective", NextTokenConfig)
register_variant("objective", PreferenceConfig)
