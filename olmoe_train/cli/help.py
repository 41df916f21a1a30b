"""What `olmoe VERB --help` prints, without importing the verb, which for most verbs imports torch."""

import ast
from importlib.util import find_spec
from pathlib import Path

from olmoe_train.cli.multirun import HELP as MULTIRUN_HELP
from olmoe_train.cli.ranks import HELP as NPROC_HELP
from olmoe_train.config.keys import help_text
from olmoe_train.config.verbs import VERBS

ON_RANKS = ("analyze", "doctor", "evaluate", "experts", "explain", "logprobs", "prune", "train")
"""Verbs that take --nproc."""


def module_of(verb: str) -> str:
    """The module of a verb; it has a function `run`, and its docstring begins with what the verb does."""
    return "olmoe_train.train" if verb == "train" else f"olmoe_train.cli.{verb}"


def description(verb: str, docstring: str | None) -> str:
    """What a verb does, by the first paragraph of its module's docstring, and its flags."""
    flags = [NPROC_HELP] if verb in ON_RANKS else []
    flags += [MULTIRUN_HELP] if verb == "train" else []
    return "\n".join([(docstring or "").split("\n\n")[0].rstrip(), *flags])


def verb_help(verb: str) -> str:
    """The help of a verb, from the source of its module."""
    found = find_spec(module_of(verb))
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).read_text(encoding="utf-8")
    return help_text(verb, VERBS[verb], description(verb, ast.get_docstring(ast.parse(source))))
