"""The metrics of validation: of validation splits and held-out sets, of downstream tasks, and samples."""

from olmoe_train.run.metric import Better, Group, Metric

LOWER, HIGHER = Better.lower, Better.higher
_ACCURACY = "fraction, 0 to 1"
_DIVIDED = "as `task/NAME/acc`, of the log-likelihood divided by the {} of the choice"

VALIDATION: tuple[Metric, ...] = (
    Metric(
        "eval/NAME/loss",
        "as `train/loss`",
        "the objective's loss on the validation split, without router losses; of `grpo`, the negative "
        "reward. Of a set of `evaluation.sets`, the cross-entropy in nats per target token",
        Group.validation,
        LOWER,
        "loss {:.4f}",
    ),
    Metric(
        "eval/NAME/ema_loss",
        "as `train/loss`",
        "`eval/NAME/loss` of the average of the weights; with `trainer.ema_decay`",
        Group.validation,
        LOWER,
        "loss of the average {:.4f}",
    ),
    Metric(
        "eval/NAME/perplexity",
        "none",
        "exp(loss), of `next_token` and of `evaluation.sets`",
        Group.validation,
        LOWER,
        "perplexity {:.2f}",
    ),
    Metric(
        "eval/NAME/bits_per_byte",
        "bits per byte",
        "loss x target tokens / (ln 2 x their UTF-8 bytes), of `next_token` and of `evaluation.sets`. It "
        "compares models with different tokenizers. Only with a byte-level BPE",
        Group.validation,
        LOWER,
        "bits per byte {:.4f}",
    ),
    Metric(
        "eval/NAME/loss_by_position",
        "nats per target token, a list",
        "as `train/loss_by_position`, on the validation split",
        Group.validation,
        LOWER,
    ),
    Metric(
        "eval/samples",
        "a list of prompt and completion",
        'greedy continuations of `evaluation.prompts`: a list of `{"prompt": ..., "completion": ...}`',
        Group.validation,
    ),
    Metric(
        "task/NAME/acc",
        _ACCURACY,
        "share of a downstream task's questions whose right choice has the greatest log-likelihood; of a "
        "tie, the first choice wins. Of `evaluation.tasks`, but not of those of the format bpb",
        Group.validation,
        HIGHER,
        "acc {:.3f}",
    ),
    Metric(
        "task/NAME/acc_per_token",
        _ACCURACY,
        _DIVIDED.format("tokens"),
        Group.validation,
        HIGHER,
        "per token {:.3f}",
    ),
    Metric(
        "task/NAME/acc_per_char",
        _ACCURACY,
        _DIVIDED.format("characters"),
        Group.validation,
        HIGHER,
        "per char {:.3f}",
    ),
    Metric(
        "task/NAME/acc_per_byte",
        _ACCURACY,
        _DIVIDED.format("UTF-8 bytes"),
        Group.validation,
        HIGHER,
        "per byte {:.3f}",
    ),
    Metric(
        "task/NAME/ce",
        "nats per token",
        "cross-entropy of the right choice, the mean over questions",
        Group.validation,
        LOWER,
        "ce {:.4f}",
    ),
    Metric(
        "task/NAME/bits_per_byte",
        "bits per byte",
        "cross-entropy of the right choice per UTF-8 byte, the mean over questions",
        Group.validation,
        LOWER,
        "bits per byte {:.4f}",
    ),
    Metric(
        "eval/tasks",
        "a list of results",
        "one result per task, in the metric that the task is known by: a list of "
        '`{"task": ..., "metric": ..., "score": ..., "stderr": ..., "chance": ..., "questions": ...}`. '
        "`stderr` is the standard error of the mean over questions; `chance` is the expected accuracy of "
        "guessing, `null` of a metric that is no accuracy",
        Group.validation,
    ),
)
"""In the order of the console's line."""
