"""Evaluate models: loss, perplexity and bits per byte of prepared data and of named held-out sets
(evaluation.sets), and downstream tasks (evaluation.tasks).

Several sources are evaluated one after the other and compared, with standard errors. No result depends on
how tokens and questions are divided into batches and ranks.
"""

import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track

from olmoe_train.checkpoint.convert.sharded_model import load_on_ranks
from olmoe_train.checkpoint.convert.stored_model import StoredModel
from olmoe_train.cli.app import run_verb
from olmoe_train.cli.evaluate_output import SourceResult, show_all, show_one, show_overlaps, write_results
from olmoe_train.cli.help import description
from olmoe_train.cli.model_sources import check_data, names_of_sources, open_source
from olmoe_train.cli.ranks import end_process, on_ranks
from olmoe_train.cli.sources import collect_sources
from olmoe_train.config.choices import Weights
from olmoe_train.config.data import DataConfig
from olmoe_train.config.verbs import EvaluateConfig
from olmoe_train.data.mixture import read_manifests, verify
from olmoe_train.data.token_bytes import token_bytes_or_reason
from olmoe_train.data.tokenizer import load_tokenizer
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.distributed.rendezvous import leave_distributed
from olmoe_train.evaluation.perplexity import Evaluation, evaluate_data, evaluate_sets
from olmoe_train.evaluation.samples import sample_prompts
from olmoe_train.evaluation.tasks.build import read_tasks
from olmoe_train.evaluation.tasks.overlap import Overlap, find_overlaps
from olmoe_train.evaluation.tasks.requests import encode_tasks
from olmoe_train.evaluation.tasks.score import TaskResult, evaluate_tasks
from olmoe_train.evaluation.tasks.task import Task
from olmoe_train.model import OlmoeConfig
from olmoe_train.training.preflight.ablations import evaluation_errors
from olmoe_train.training.preflight.evaluated_model import (
    layout_errors,
    layout_warnings,
    option_errors,
    text_data,
)
from olmoe_train.training.preflight.evaluation import set_errors
from olmoe_train.utils.errors import UserError

LEAVE_S = 600.0
"""Longest time that ranks wait for each other when they meet and when they leave, in seconds."""
Item = TypeVar("Item")


def main(cfg: EvaluateConfig) -> None:
    """Evaluate the sources, print tables, and write the JSON file."""
    device = init_distributed(cfg.device.value, LEAVE_S, device_key="device")
    is_rank_0 = dist.get_rank() == 0
    try:
        results, tasks = evaluate(cfg, device)
    finally:
        leave_distributed(LEAVE_S)
    if is_rank_0:
        write_results(cfg.out, results, overlaps={})
        if cfg.check_overlap is not None:
            # Without the other ranks, which wait for LEAVE_S at most: reading the data may take hours.
            write_results(cfg.out, results, overlaps_with(cfg.check_overlap, tasks, results))


def evaluate(cfg: EvaluateConfig, device: torch.device) -> tuple[list[SourceResult], list[Task]]:
    """Evaluate within a process group. Rank 0 prints the results.

    Returns:
        (The result of each source, the same on every rank; the tasks).

    Raises:
        UserError: A model, the data, a set, a task or an option is wrong; the message names the key and the
            fix.
    """
    if errors := option_errors(cfg):
        raise UserError("\n  ".join(errors))
    names, data = names_of_sources(cfg.source), text_data(cfg)
    if data is not None:
        verify(data)
    sources = {name: open_source(name, cfg.trust_pickle, cfg.strip_prefix, which=cfg.which) for name in names}
    if errors := source_errors(cfg, data, sources):
        raise UserError("\n  ".join(errors))
    tasks = read_tasks(cfg.evaluation.tasks, cfg.evaluation.max_questions)
    results = [
        evaluate_source(cfg, data, tasks, name, stored, device, is_compared=len(sources) > 1)
        for name, stored in sources.items()
    ]
    if dist.get_rank() == 0:
        warn(cfg, data, results)
        if len(results) == 1:
            show_one(results[0], data)
        else:
            show_all(results)
    return results, tasks


def overlaps_with(directory: str, tasks: list[Task], results: list[SourceResult]) -> dict[str, Overlap]:
    """Look up the questions in prepared data, and print what is found. Name of a task -> its overlap."""
    overlaps = find_overlaps(tasks, directory, with_progress=progress(f"reading {directory}", True))
    show_overlaps(directory, overlaps, results)
    return overlaps


def source_errors(cfg: EvaluateConfig, data: DataConfig | None, sources: dict[str, StoredModel]) -> list[str]:
    """What keeps the sources from being evaluated, one message per error."""
    manifests = {} if data is None else read_manifests(data)
    errors = [] if data is None else set_errors(cfg.evaluation.sets, data, manifests)
    for name, stored in sources.items():
        of_source = layout_errors(cfg.parallel, stored.config, dist.get_world_size())
        if stored.config.routing == "expert_choice":
            of_source += evaluation_errors(cfg.evaluation)
        if data is not None:
            try:
                check_data(stored.config, next(iter(manifests.values())), data)
            except UserError as error:
                of_source.append(str(error))
        errors += [f"source={name}: {error}" if len(sources) > 1 else error for error in of_source]
    return errors


def evaluate_source(
    cfg: EvaluateConfig,
    data: DataConfig | None,
    tasks: list[Task],
    name: str,
    stored: StoredModel,
    device: torch.device,
    is_compared: bool,
) -> SourceResult:
    """Load one source in its layout, and evaluate it. Collective.

    Args:
        cfg: The options, checked.
        data: What `text_data` returned.
        tasks: The tasks.
        name: As `source=` names it.
        stored: The source.
        device: Device of this rank.
        is_compared: Whether there are other sources, so that the sums of each sequence are kept.

    Raises:
        UserError: A weight, a loss or a log-likelihood is not finite, or the source has no tokenizer.
    """
    evaluation, config = cfg.evaluation, stored.config
    encoded = encode_tasks(tasks, load_tokenizer(stored.tokenizer), config) if tasks else []
    if cfg.precision is not None:
        config.dtype = cfg.precision.dtype
    model = load_on_ranks(stored, cfg.parallel, device)
    shows = dist.get_rank() == 0
    options = {"check_finite": dist.get_world_size() == 1, "keep_sequences": is_compared}
    of_data = of_sets = {}
    if data is not None:
        if cfg.data.dir:
            of_data = evaluate_data(model, data, evaluation, device, progress("validation", shows), **options)
        of_sets = evaluate_sets(model, data, evaluation, device, progress("sets", shows), **options)
    of_tasks = evaluate_tasks(model, encoded, evaluation.tokens_per_pass, device, progress("tasks", shows))
    check_results(of_data | of_sets, of_tasks, config)
    samples: list[dict[str, str]] = []
    if evaluation.prompts:
        tokenizer = load_tokenizer(stored.tokenizer)
        samples = sample_prompts(model, tokenizer, evaluation.prompts, evaluation.sample_tokens, device)
    shown = name if stored.which is Weights.weights else f"{name} (average of the weights)"
    return SourceResult(shown, of_data, of_sets, of_tasks, samples)


def progress(what: str, is_shown: bool) -> Callable[[Iterable[Item]], Iterable[Item]]:
    """Wraps the batches of a long pass: a bar with the time left, in a terminal.

    Args:
        what: Beside the bar.
        is_shown: Whether this rank shows it.
    """
    console = Console(stderr=True)
    hidden = not (is_shown and console.is_terminal)
    return partial(track, description=what, console=console, disable=hidden, transient=True)


def check_results(sets: dict[str, Evaluation], tasks: list[TaskResult], config: OlmoeConfig) -> None:
    """Refuse results that are not finite. One process names the logit of a loss; ranks cannot, and say so.

    Raises:
        UserError: A loss or a log-likelihood is not finite.
    """
    why = f"the weights are damaged, or {config.dtype} cannot hold what the model computes"
    for name, one in sets.items():
        if one.tokens and not math.isfinite(one.loss):
            raise UserError(
                f"the loss of {name} is not finite: {why}; on one process, this command names the first such "
                "logit"
            )
    for task in tasks:
        if not math.isfinite(task.mean(task.metric)):
            raise UserError(f"a log-likelihood of the task {task.name} is not finite: {why}")


def warn(cfg: EvaluateConfig, data: DataConfig | None, results: list[SourceResult]) -> None:
    """Print warnings to the standard error."""
    warnings = layout_warnings(cfg.parallel, dist.get_world_size())
    if data is not None and (reason := token_bytes_or_reason(data)[1]) is not None:
        warnings.append(f"no bits per byte: {reason}")
    warnings += [
        f"{one.name}: {task.cut_contexts:,} choices of the task {task.name} are longer than the model reads, "
        "and lose the beginning of their context"
        for one in results
        for task in one.tasks
        if task.cut_contexts
    ]
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)


def run() -> int:
    """Run `olmoe evaluate` with the command line; returns the exit code."""
    sys.argv[1:] = collect_sources(sys.argv[1:])
    return on_ranks(
        "olmoe_train.cli.evaluate",
        partial(run_verb, "evaluate", EvaluateConfig, main, description("evaluate", __doc__)),
    )


if __name__ == "__main__":
    end_process(run())
