"""What an evaluation of downstream tasks logs, made by hand."""

from typing import Any


def result(
    task: str, metric: str, score: float, stderr: float, chance: float | None, questions: int
) -> dict[str, Any]:
    """One element of eval/tasks."""
    return {
        "task": task,
        "metric": metric,
        "score": score,
        "stderr": stderr,
        "chance": chance,
        "questions": questions,
    }


def task_values(accuracy: float = 0.61) -> dict[str, Any]:
    """Of two tasks: arc_easy, of the given accuracy, and gsm.v1 of the format bpb."""
    accuracies = ("acc", "acc_per_token", "acc_per_char", "acc_per_byte")
    return {
        **{f"task/arc_easy/{metric}": accuracy for metric in accuracies},
        "task/arc_easy/ce": 3.25,
        "task/arc_easy/bits_per_byte": 1.5,
        "task/gsm.v1/ce": 2.0,
        "task/gsm.v1/bits_per_byte": 0.75,
        "eval/tasks": [
            result("arc_easy", "acc", accuracy, 0.02, 0.25, 570),
            result("gsm.v1", "bits_per_byte", 0.75, 0.125, None, 1319),
        ],
    }
