"""What a downstream task is: questions with choices, and the metric that sums up the answers."""

from dataclasses import dataclass
from enum import Enum


class TaskFormat(Enum):
    """How a question is asked."""

    rc = "rc"
    """Ranked continuation: each choice continues the question by its text."""
    mc = "mc"
    """Multiple choice: the question lists the choices by letter, and the letter of each continues it."""
    bpb = "bpb"
    """Only the right choice continues the question: its bits per byte."""


class TaskMetric(Enum):
    """What a task is summed up by; each is a mean over questions."""

    acc = "acc"
    """Share of the questions whose right choice has the greatest log-likelihood; of a tie, the first choice
    wins."""
    acc_per_token = "acc_per_token"
    """As acc, of the log-likelihood divided by the tokens of the choice."""
    acc_per_char = "acc_per_char"
    """As acc, of the log-likelihood divided by the characters of the choice."""
    acc_per_byte = "acc_per_byte"
    """As acc, of the log-likelihood divided by the UTF-8 bytes of the choice."""
    ce = "ce"
    """Cross-entropy of the right choice, in nats per token."""
    bits_per_byte = "bits_per_byte"
    """Cross-entropy of the right choice, in bits per UTF-8 byte."""


ACCURACIES = (TaskMetric.acc, TaskMetric.acc_per_token, TaskMetric.acc_per_char, TaskMetric.acc_per_byte)
"""Metrics that need all choices; higher is better."""


@dataclass(frozen=True)
class Question:
    """One question, ready to be asked. Tokens are not known yet."""

    context: str
    """What precedes a choice: the examples of a few-shot prompt, the question and "Answer:". May be empty."""
    choices: tuple[str, ...]
    """What may continue the context, with the space that joins it. At least one."""
    gold: int
    """Index of the right choice."""
    text: str
    """The question alone, without prompt, examples and choices."""
    origin: str
    """Where it comes from, for messages: FILE:LINE, or NAME[INDEX]."""
    own_contexts: tuple[str, ...] = ()
    """What precedes each choice, where the choices differ in their contexts and not in how they continue, as
    in WinoGrande. Empty: `context` precedes all choices."""

    def context_of(self, choice: int) -> str:
        """What precedes a choice."""
        return self.own_contexts[choice] if self.own_contexts else self.context

    def length_of(self, choice: int) -> tuple[int, int]:
        """(Characters, UTF-8 bytes) of a choice, each at least 1.

        The space that joins the choice to the context does not count, as in lm-eval, and in the in-loop
        evaluation of the released OLMoE (v1 of ai2-olmo-eval).
        """
        text = self.choices[choice].removeprefix(" ")
        return max(1, len(text)), max(1, len(text.encode()))


@dataclass(frozen=True)
class Task:
    name: str
    """As in metrics: task/NAME/acc."""
    questions: tuple[Question, ...]
    """At least one."""
    metric: TaskMetric
    """The metric that the task is known by."""
    format: TaskFormat
    joint: bool
    """Whether context and choice are tokenized together, and cut where the context ends, as in lm-eval.
    False: each by itself, as in ai2-olmo-eval."""

    @property
    def chance(self) -> float | None:
        """Expected accuracy of guessing; None: the metric is no accuracy."""
        if self.metric not in ACCURACIES:
            return None
        return sum(1 / len(one.choices) for one in self.questions) / len(self.questions)
