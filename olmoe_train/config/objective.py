"""The options of `objective`: one dataclass per training objective."""

import re
from dataclasses import dataclass

from olmoe_train.config.choices import (
    IpoLogProbs,
    PreferenceKind,
    Reference,
    RewardKind,
    RoutingUse,
)
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


@dataclass(frozen=True)
class GrpoConfig(ObjectiveConfig):
    """Reinforcement learning with verified rewards: GRPO (arXiv 2402.03300) on prompts with answers. In every
    step the model samples group_size completions of each prompt, from its own distribution. A completion's
    advantage is its reward minus the mean of its group, divided by the group's standard deviation.
    trainer.global_batch_size and trainer.micro_batch_size count prompts."""

    name: str = "grpo"
    group_size: int = 8
    """Completions per prompt."""
    max_new_tokens: int = 256
    """Most tokens of a completion. A prompt may have data.sequence_length minus this many."""
    clip_low: float = 0.2
    """The ratio of a token's probabilities, in the training pass and when it was sampled, counts as at least
    1 minus this where the advantage is negative."""
    clip_high: float = 0.2
    """The ratio counts as at most 1 plus this where the advantage is positive."""
    divide_by_std: bool = True
    """Divide advantages by the standard deviation of the group's rewards. false: as in Dr. GRPO (arXiv
    2503.20783)."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the initial model, which then runs in every step. 0: no such model."""
    routing: RoutingUse = RoutingUse.replay
    """Experts of the training pass. replay: those of the sampled pass, token by token. record: the router's
    own choice; rollout/routing_agreement says how often both are the same."""
    reward: RewardKind = RewardKind.exact
    """What is compared with the answer. exact: the completion. regex: the last match of reward_pattern.
    python: reward_function decides."""
    reward_pattern: str | None = None
    """Regular expression whose first group, or else whose match, is the completion's answer: '####
    (-?[0-9,]+)'."""
    reward_function: str | None = None
    """Python function FILE.py:FUNCTION of (completion, answer), two texts, that returns the reward as a
    number. The file is code that this run executes."""

    @property
    def sequences_per_sample(self) -> int:
        return self.group_size

    def errors(self) -> list[str]:
        errors = []
        if self.group_size < 2:
            errors.append(
                f"objective.group_size={self.group_size}: must be at least 2, to compare completions"
            )
        if self.max_new_tokens < 1:
            errors.append(f"objective.max_new_tokens={self.max_new_tokens}: must be positive")
        for key in ("clip_low", "clip_high", "kl_coef"):
            if getattr(self, key) < 0:
                errors.append(f"objective.{key}={getattr(self, key)}: must not be negative")
        for kind, key in ((RewardKind.regex, "reward_pattern"), (RewardKind.python, "reward_function")):
            given = getattr(self, key)
            if self.reward is kind and given is None:
                errors.append(f"objective.{key}: has no value, and objective.reward={kind.value} needs one")
            if self.reward is not kind and given is not None:
                errors.append(f"objective.{key}={given}: has no effect; set objective.reward={kind.value}")
        try:
            re.compile(self.reward_pattern or "")
        except re.error as error:
            errors.append(f"objective.reward_pattern={self.reward_pattern}: no regular expression: {error}")
        return errors


register_variant("objective", NextTokenConfig)
register_variant("objective", GrpoConfig)
register_variant("objective", PreferenceConfig)
