"""The import contract of .importlinter holds for the package and fails for a copy that breaks it."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the package in `root` with the contract in `root`, in a process of its own."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package and of its contract."""
    shutil.copytree(
        REPO / "olmoe_train", tmp_path / "olmoe_train", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(REPO / ".importlinter", tmp_path)
    return tmp_path


def test_imports_go_down_only(package: Path) -> None:
    run = lint_imports(package)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("utils", "model"), ("model", "config"), ("distributed", "data"), ("training", "cli")],
)
def test_an_import_that_does_not_go_down_is_found(package: Path, importer: str, imported: str) -> None:
    """An import up, or between two packages of one layer, is an error inside a function as well."""
    module = package / "olmoe_train" / importer / "planted.py"
    module.write_text(f"def late() -> None:\n    import olmoe_train.{imported}\n")
    run = lint_imports(package)
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"olmoe_train.{importer}.planted -> olmoe_train.{imported}" in run.stdout


def names_the_whole_configuration(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text()))
    return any(isinstance(node, ast.alias) and node.name == "TrainConfig" for node in nodes)


def test_few_see_the_whole_configuration() -> None:
    """The loop, what builds its parts, preflight checks and config/; all else gets a section or an object."""
    root = REPO / "olmoe_train"
    seeing = {path.relative_to(root) for path in root.rglob("*.py") if names_the_whole_configuration(path)}
    builders = ("build.py", "build_balancer.py", "build_objective.py")
    allowed = {Path("train.py"), *(Path("training") / name for name in builders)}
    places = (Path("config"), Path("training/preflight"))
    assert allowed <= seeing, "the search finds nothing"
    assert {path for path in seeing - allowed if not any(place in path.parents for place in places)} == set()


def test_a_package_on_no_floor_is_found(package: Path) -> None:
    (package / "olmoe_train" / "loose").mkdir()
    (package / "olmoe_train" / "loose" / "__init__.py").touch()
    run = lint_imports(package)
    assert run.returncode != 0
    assert "olmoe_train.loose" in run.stdout + run.stderr
