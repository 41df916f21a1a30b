"""Every metric that a run logs: name, unit, meaning, which direction is better, and how people see it.

The console's lines, wandb's summaries and the documentation's page read this list. A metric that is logged
and not listed here is a failing test.
"""

import re
from functools import cache

from olmoe_train.run.metric import Better, Group, Metric
from olmoe_train.run.metric_alarms import DEAD_EXPERTS, LOW_ENTROPY, SKIPPED_STEPS, UNEVEN_LOAD
from olmoe_train.run.metrics_validation import VALIDATION

LOWER, HIGHER = Better.lower, Better.higher
_ROUTER = "router/layer_NN"
_PER_TOKEN = "; for `dpo_norm`, `ipo`, `simpo` and `orpo`"


def _rewards(kind: str, unit: str, log_unit: str, of: str, ending: str) -> list[Metric]:
    """The metrics of the rewards, and of the log-probabilities, per completion or per token."""
    label, group = kind.replace("_", " "), Group.preferences
    return [
        Metric(
            f"rewards{kind}/chosen",
            unit,
            f"mean reward of the chosen (wanted) completions, of {of}{ending}",
            group,
        ),
        Metric(f"rewards{kind}/rejected", unit, f"the same of the rejected (unwanted) ones{ending}", group),
        Metric(
            f"rewards{kind}/margins",
            unit,
            f"difference of the two{ending}",
            group,
            HIGHER,
            f"margin{label} {{:.3f}}",
        ),
        Metric(
            f"rewards{kind}/accuracies",
            "fraction, 0 to 1",
            "share of the pairs whose chosen completion has the higher reward; a tie counts as half. Not for "
            f"`kto`{ending}",
            group,
            HIGHER,
            f"accuracy{label} {{:.3f}}",
        ),
        Metric(f"logps{kind}/chosen", log_unit, f"mean log-probability, {of}{ending}", group),
        Metric(f"logps{kind}/rejected", log_unit, f"mean log-probability, {of}{ending}", group),
    ]


METRICS: tuple[Metric, ...] = (
    Metric("step", "steps", "optimizer steps taken, including skipped ones", Group.progress),
    Metric("tokens", "tokens", "tokens trained on so far, without padding", Group.progress),
    Metric("time", "seconds since 1970", "when the record was written", Group.progress),
    Metric(
        "resumes",
        "starts",
        "how many starts of the run came before the one that wrote the record",
        Group.progress,
    ),
    Metric(
        "alerts",
        "a list of name and text",
        "what the run warns of since the last record, each once in a run: a list of "
        '`{"name": ..., "text": ...}`; only in records that have some',
        Group.health,
    ),
    Metric(
        "train/loss",
        "nats",
        "the total loss: that of the objective plus the weighted router losses",
        Group.loss,
        LOWER,
        "loss {:.4f}",
    ),
    Metric(
        "train/loss_by_position",
        "nats per target token, a list",
        "cross-entropy by position in the sequence, in 16 equal parts (fewer for a shorter sequence); `null` "
        "where there is no target. Of `next_token`, every `logging.details_every` steps",
        Group.loss,
        LOWER,
    ),
    Metric("train/ce_loss", "nats per target token", "cross-entropy", Group.loss, LOWER, "ce {:.4f}"),
    Metric(
        "train/preference_loss",
        "none",
        "the loss of the pairs, without the router losses and the term of `objective.sft_weight`",
        Group.preferences,
        LOWER,
        "preference {:.4f}",
    ),
    Metric(
        "train/sft_loss",
        "nats per token",
        "mean over pairs of -s / n of the chosen completion; with `objective.sft_weight`",
        Group.preferences,
        LOWER,
        "sft {:.3f}",
    ),
    *_rewards("", "none", "nats", "summed log-probabilities", ""),
    *_rewards("_per_token", "per token", "nats per token", "log-probabilities per token", _PER_TOKEN),
    Metric(
        "train/nll_loss",
        "nats per token",
        "of `orpo`: -s / n of the chosen completion",
        Group.preferences,
        LOWER,
    ),
    Metric("train/log_odds_chosen", "none", "of `orpo`: the log odds ratio", Group.preferences, HIGHER),
    Metric(
        "train/log_odds_ratio",
        "none",
        "of `orpo`: log sigmoid of the log odds ratio",
        Group.preferences,
        HIGHER,
    ),
    Metric(
        "kl",
        "nats",
        "of `kto`: z, the estimate of the KL divergence, at least 0. Of `grpo`: the estimate of the KL "
        "divergence from the initial model; with `objective.kl_coef`",
        Group.preferences,
        console="kl {:.3f}",
    ),
    Metric("reward", "none", "mean reward", Group.rewards, HIGHER, "reward {:.3f}"),
    Metric(
        "reward_std",
        "none",
        "mean over prompts of the standard deviation of their completions' rewards",
        Group.rewards,
    ),
    Metric("completions/mean_length", "tokens", "mean length, eos included", Group.rewards),
    Metric(
        "train/policy_loss",
        "none",
        "the loss without the router losses and the KL divergence",
        Group.rewards,
        console="policy {:.4f}",
    ),
    Metric(
        "clip_ratio/region_mean",
        "fraction, 0 to 1",
        "tokens without a gradient because their ratio is clipped, the mean over completions of each one's "
        "share",
        Group.rewards,
    ),
    Metric(
        "rollout/routing_agreement",
        "fraction, 0 to 1",
        "share of the sampled pass's expert choices that the training pass makes, too",
        Group.rewards,
        HIGHER,
    ),
    Metric(
        "rollout/log_prob_difference",
        "nats",
        "mean difference of a token's log-probability in the training pass and when it was sampled",
        Group.rewards,
        LOWER,
    ),
    Metric(
        "train/load_balancing_loss",
        "none",
        "load-balancing loss, unweighted, in the chosen "
        "[convention](../concepts/load-balancing.md#conventions); over the whole step where it has no weight",
        Group.loss,
        LOWER,
        "balance {:.3f}",
    ),
    Metric(
        "train/sequence_balancing_loss",
        "none",
        "[sequence-wise balancing loss](../concepts/load-balancing.md#the-sequence-wise-loss), unweighted",
        Group.loss,
        LOWER,
        "balance of sequences {:.3f}",
    ),
    Metric("train/router_z_loss", "nats²", "router z-loss, unweighted", Group.loss, LOWER, "z {:.3f}"),
    Metric(
        "train/grad_norm",
        "none",
        "global 2-norm of the gradient, before clipping",
        Group.health,
        console="grad norm {:.3f}",
    ),
    Metric("train/lr", "none", "learning rate of the step", Group.loss, console="lr {:.2e}"),
    Metric(
        "train/skipped_steps",
        "steps",
        "steps of the whole run whose update was skipped, because a gradient was not finite or was a spike",
        Group.health,
        LOWER,
        alarm=SKIPPED_STEPS,
    ),
    Metric(
        "perf/tokens_per_second",
        "tokens per second",
        "speed since the last logged step, over all ranks, without the time of validation and saving",
        Group.performance,
        HIGHER,
        "{:,.0f} tok/s",
    ),
    Metric(
        "perf/mfu",
        "fraction, 0 to 1",
        "model FLOPs utilization: arithmetic of the model per second, as a fraction of the peak of all "
        "devices. Passes without gradients do not count. `null` if the peak of the device is unknown, as on "
        "a CPU",
        Group.performance,
        HIGHER,
        "mfu {:.1%}",
    ),
    Metric(
        "perf/peak_memory_gib",
        "GiB",
        "most memory in use so far on rank 0: of CUDA's allocator, or the resident set of the process on a "
        "CPU",
        Group.performance,
        LOWER,
    ),
    Metric(
        "router/max_violation",
        "none",
        "tokens of the busiest expert divided by the mean over experts, minus 1; 0 is perfect balance. The "
        "maximum over layers",
        Group.router,
        LOWER,
        alarm=UNEVEN_LOAD,
    ),
    Metric(
        "router/entropy",
        "nats",
        "mean entropy of the routing distribution per token; ln(E) is uniform. The mean over layers",
        Group.router,
        alarm=LOW_ENTROPY,
    ),
    Metric(
        "router/dead_experts",
        "experts",
        "experts that had no token for `logging.dead_expert_steps` steps. The sum over layers",
        Group.experts,
        LOWER,
        alarm=DEAD_EXPERTS,
    ),
    Metric(f"{_ROUTER}/max_violation", "none", "of one layer, counted from 00", Group.router, LOWER),
    Metric(f"{_ROUTER}/entropy", "nats", "of one layer", Group.router),
    Metric(
        f"{_ROUTER}/z",
        "nats²",
        "router z-loss of one layer, unweighted: the mean over tokens of logsumexp(router logits)²",
        Group.router,
        LOWER,
    ),
    Metric(
        f"{_ROUTER}/saturation",
        "fraction, 0 to 1",
        "share of the top-k experts of fixed validation tokens that are those of `logging.router_reference`; "
        "k / E is chance. Every `logging.router_analysis_every` steps",
        Group.router,
    ),
    Metric(
        f"{_ROUTER}/agreement_with_previous",
        "fraction, 0 to 1",
        "share of the experts of the same tokens that are those of the analysis before. Every "
        "`logging.router_analysis_every` steps",
        Group.router,
    ),
    Metric(f"{_ROUTER}/dead_experts", "experts", "of one layer", Group.experts, LOWER),
    Metric(
        f"{_ROUTER}/load",
        "fractions, a list of E",
        "share of each expert in the tokens of the step; the shares sum to 1",
        Group.experts,
    ),
    Metric(
        f"{_ROUTER}/domain_share/NAME",
        "fractions, a list of E",
        "share of the validation tokens of a mixture's source that each expert processes; the shares sum to "
        "k. Every `logging.router_analysis_every` steps",
        Group.experts,
    ),
    *VALIDATION,
    Metric(
        "data/NAME/loss",
        "nats per target token",
        "cross-entropy of a mixture's source in the step; `null` where the step has none of its targets. Of "
        "`next_token`, every `logging.details_every` steps",
        Group.data,
        LOWER,
    ),
    Metric(
        "data/sequences_without_targets",
        "sequences",
        "sequences with nothing to predict, since the last logged step",
        Group.data,
    ),
    Metric(
        "data/repetitive_sequences",
        "sequences",
        "sequences that the repetition filter masked, since the last logged step; with "
        "`data.repetition_filter`",
        Group.data,
    ),
    Metric(
        "data/padding",
        "fraction, 0 to 1",
        "share of padding since the last logged step; unless `data.packing=concat`",
        Group.data,
        LOWER,
    ),
    Metric(
        "data/NAME/share", "fraction, 0 to 1", "share of a mixture's source in the tokens so far", Group.data
    ),
    Metric(
        "data/NAME/requested_share",
        "fraction, 0 to 1",
        "the share that `data.mixture` requests, or `data.stages` over the stages so far",
        Group.data,
    ),
    Metric(
        "data/NAME/stage_share",
        "fraction, 0 to 1",
        "share of a source in the tokens of the current stage so far; with `data.stages`",
        Group.data,
    ),
    Metric(
        "data/NAME/requested_stage_share",
        "fraction, 0 to 1",
        "the share that `data.stages` requests in the current stage",
        Group.data,
    ),
    Metric(
        "data/stage",
        "stages, from 1",
        "stage of the last sequence of the step; with `data.stages`",
        Group.data,
    ),
    Metric("data/NAME/epochs", "passes", "how often the source has been seen", Group.data),
)
"""In the order of the console's line."""

VALIDATED = (Group.preferences, Group.rewards)
"""Groups whose metrics validation has, too, under eval/NAME/."""


@cache
def find_metric(name: str) -> Metric | None:
    """The metric of a name in metrics.jsonl; None: there is none.

    The metric of eval/validation/rewards/margins is rewards/margins, and that of eval/validation/nll_loss is
    train/nll_loss.
    """
    for metric in METRICS:
        pattern = re.escape(metric.name).replace("NAME", "[^/]+").replace("NN", "[0-9]{2}")
        if re.fullmatch(pattern, name):
            return metric
    validated = re.fullmatch("eval/[^/]+/(.+)", name)
    if validated is None:
        return None
    found = find_metric(validated[1]) or find_metric(f"train/{validated[1]}")
    return found if found is not None and found.group in VALIDATED else None


def section_of(name: str) -> str | None:
    """The section of dashboards for a name in metrics.jsonl; None: no metric has the name."""
    metric = find_metric(name)
    if metric is None:
        return None
    return Group.validation.section if name.startswith("eval/") else metric.group.section


def shown(name: str, value: float | None) -> str | None:
    """A value as the console shows it; None: the console does not."""
    metric = find_metric(name)
    if value is None or metric is None or metric.console is None:
        return None
    return metric.console.format(value)
