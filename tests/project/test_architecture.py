"""The import contract of .importlinter holds for the package and fails for a copy that breaks it."""

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


def test_a_package_on_no_floor_is_found(package: Path) -> None:
    (package / "olmoe_train" / "loose").mkdir()
    (package / "olmoe_train" / "loose" / "__init__.py").touch()
    run = lint_imports(package)
    assert run.returncode != 0
    assert "olmoe_train.loose" in run.stdout + run.stderr
