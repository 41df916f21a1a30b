"""Which imports there are not: between the trees of the repository, and of torch where it only costs time."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the top-level package of every import in a file, inside functions as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("tree", "forbidden"),
    [("tests", {"benchmarks"}), ("benchmarks", {"tests"}), ("olmoe_train", {"benchmarks", "tests"})],
)
def test_trees_do_not_import_each_other(tree: str, forbidden: set[str]) -> None:
    files = list((ROOT / tree).rglob("*.py"))
    imports = {path.relative_to(ROOT).as_posix(): set(imported_packages(path)) for path in files}
    assert any("olmoe_train" in names for names in imports.values())  # the walk sees imports
    assert not {path: names & forbidden for path, names in imports.items() if names & forbidden}


def test_what_needs_no_torch_does_not_wait_for_it() -> None:
    """torch takes most of the time that a command needs to start, and TorchDynamo a good part of the rest."""
    modules = ["config", "cli.app", "cli.prepare", "cli.report", "cli.ranks"]
    code = [
        "import sys, olmoe_train.__main__, " + ", ".join(f"olmoe_train.{name}" for name in modules),
        "sys.argv = ['olmoe', 'train', '--help']",
        "assert olmoe_train.__main__.main() == 0",
        "assert 'torch' not in sys.modules",
        "from olmoe_train.model import OlmoeModel",
        "assert 'torch._dynamo' not in sys.modules",
    ]
    result = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
