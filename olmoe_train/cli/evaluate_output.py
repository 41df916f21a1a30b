"""What `olmoe evaluate` prints, and its JSON file."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmoe_train.config.data import DataConfig
from olmoe_train.data.mixture import VALIDATION, has_sources, read_manifests
from olmoe_train.evaluation.comparison import (
    LEFT,
    METHOD,
    Comparison,
    Estimate,
    compare_sets,
    compare_tasks,
    comparison_table,
    task_table,
)
from olmoe_train.evaluation.perplexity import Evaluation
from olmoe_train.evaluation.tasks.overlap import NGRAM, Overlap
from olmoe_train.evaluation.tasks.score import TaskResult, standard_error
from olmoe_train.utils.files import write_out
from olmoe_train.utils.finite import finite_or_none
from olmoe_train.utils.tables import aligned


@dataclass(frozen=True)
class SourceResult:
    """Everything that is known of one source."""

    name: str
    """As `source=` names it."""
    of_data: dict[str, Evaluation] = field(default_factory=dict)
    """Source of the data, or "validation" -> result. Empty without data.dir."""
    of_sets: dict[str, Evaluation] = field(default_factory=dict)
    """Name of a set -> result."""
    tasks: list[TaskResult] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    """Prompts with their completions."""


def show_one(result: SourceResult, data: DataConfig | None) -> None:
    """Print the results of the only source. data: the prepared data, or the first set."""
    print(f"source           {result.name}")
    if result.of_data:
        assert data is not None
        show_data(result.of_data, data)
    if result.of_sets:
        print(f"\n{set_table(result.of_data | result.of_sets)}")
    if result.tasks:
        print(f"\n{task_table(result.tasks)}")
    show_samples(result)


def show_data(of_data: dict[str, Evaluation], data: DataConfig) -> None:
    """Print the results on the validation split of each source of the data, and of all together."""
    total = of_data[VALIDATION]
    for name, part in of_data.items():
        if name != VALIDATION:
            text = f"loss {part.loss:.4f}, perplexity {part.perplexity:.2f}, tokens {part.tokens:,}"
            print(f"  {name}: {text}")
    print(f"loss             {total.loss:.4f} nats per token")
    print(f"perplexity       {total.perplexity:.2f}")
    if total.bits_per_byte is not None:
        print(f"bits per byte    {total.bits_per_byte:.4f}")
    print(f"tokens           {total.tokens:,}")
    manifest = next(iter(read_manifests(data).values()))
    if not has_sources(data) and manifest.unigram_entropy is not None:
        entropy = f"{manifest.unigram_entropy:.4f} nats per token"
        print(f"unigram entropy  {entropy} (the loss of predictions from token frequencies only)")


def show_samples(result: SourceResult) -> None:
    for sample in result.samples:
        print(f"\n{sample['prompt']}{sample['completion']}")


def show_all(results: Sequence[SourceResult]) -> None:
    """Print the results of several sources side by side, and what differs from the first one."""
    for number, result in enumerate(results, 1):
        print(f"[{number}] {result.name}")
    print(f"\n{comparison_table(compare(results), len(results))}\n\n{METHOD}")
    for number, result in enumerate(results, 1):
        if result.samples:
            print(f"\n[{number}]")
        show_samples(result)


def show_overlaps(directory: str, overlaps: dict[str, Overlap], results: Sequence[SourceResult]) -> None:
    """Print what each task shares with prepared data, and the scores of the questions that share nothing."""
    scores = [f"[{number}] clean" for number in range(1, len(results) + 1)]
    rows = [["task", "", "questions", "touched", "too short", f"{NGRAM}-grams found", *scores]]
    for number, (name, overlap) in enumerate(overlaps.items()):
        questions = len(overlap.matched_Q)
        found = f"{overlap.matched_Q.sum():,} of {overlap.ngrams_Q.sum():,}"
        counts = [f"{questions:,}", f"{overlap.touched.sum():,}", f"{overlap.too_short:,}", found]
        rows.append([name, "", *counts, *(clean_score(one.tasks[number], overlap).text() for one in results)])
    print(f"\nquestions in {directory} ({NGRAM} successive tokens; clean: score of the others)")
    print("\n".join(aligned(rows, LEFT)))


def clean_score(task: TaskResult, overlap: Overlap) -> Estimate:
    """The score of the questions that share nothing with the training data; NaN if there are none."""
    values = task.values[task.metric][~overlap.touched]
    if not len(values):
        return Estimate(math.nan, math.nan)
    return Estimate(float(values.mean()), standard_error(values))


def compare(results: Sequence[SourceResult]) -> list[Comparison]:
    sets = [one.of_data | one.of_sets for one in results]
    return compare_sets(sets) + compare_tasks([one.tasks for one in results])


def set_table(results: dict[str, Evaluation]) -> str:
    """One line per set."""
    rows = [["set", "", "loss", "perplexity", "bits per byte", "tokens"]]
    for name, one in results.items():
        bits = "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}"
        rows.append([name, "", f"{one.loss:.4f}", f"{one.perplexity:,.2f}", bits, f"{one.tokens:,}"])
    return "\n".join(aligned(rows, LEFT))


def write_results(out: str | None, results: Sequence[SourceResult], overlaps: dict[str, Overlap]) -> None:
    """Write the JSON file, if there is to be one.

    Args:
        out: The file. None: none.
        results: Of each source.
        overlaps: Name of a task -> what it shares with the training data. Empty: nothing was looked up.

    Raises:
        UserError: The file cannot be written.
    """
    if out is None:
        return
    contents = [as_json(one, overlaps) for one in results]
    content: dict[str, Any] = contents[0]
    if len(results) > 1:
        comparisons = [one.as_json() for one in compare(results)]
        content = {"sources": contents, "comparisons": comparisons, "method": METHOD}
    write_out(Path(out).expanduser(), json.dumps(content, indent=2) + "\n")


def as_json(result: SourceResult, overlaps: dict[str, Overlap]) -> dict[str, Any]:
    """The results of one source; null where a number is not finite or not known."""
    content: dict[str, Any] = {"source": result.name}
    if sets := result.of_data | result.of_sets:
        content["sets"] = {name: set_as_json(one) for name, one in sets.items()}
    if result.tasks:
        content["tasks"] = {one.name: task_as_json(one, overlaps.get(one.name)) for one in result.tasks}
    if result.samples:
        content["samples"] = result.samples
    return content


def set_as_json(one: Evaluation) -> dict[str, Any]:
    return {
        "loss": finite_or_none(one.loss),
        "perplexity": finite_or_none(one.perplexity),
        "bits_per_byte": one.bits_per_byte,
        "tokens": one.tokens,
        "bytes": one.bytes,
        "loss_by_position": one.loss_by_position,
    }


def task_as_json(one: TaskResult, overlap: Overlap | None) -> dict[str, Any]:
    metrics = {metric.value: Estimate(one.mean(metric), one.standard_error(metric)) for metric in one.values}
    content = {key: value for key, value in one.row.items() if key != "task"}
    content["metrics"] = {name: estimate.as_json() for name, estimate in metrics.items()}
    if overlap is not None:
        content["overlap"] = {
            "questions_touched": int(overlap.touched.sum()),
            "questions_too_short": overlap.too_short,
            "ngrams": int(overlap.ngrams_Q.sum()),
            "ngrams_found": int(overlap.matched_Q.sum()),
            "touched": overlap.touched.nonzero()[0].tolist(),
            "clean_score": clean_score(one, overlap).as_json(),
        }
    return content
