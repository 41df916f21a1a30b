"""A wheel, installed away from the project, composes every preset: configs/ is inside."""

import sys
import zipfile
from pathlib import Path

import pytest

from olmoe_train import __version__
from tests.support.commands import REPO, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, REPO, cwd=out)
    assert built.returncode == 0, built.stderr
    return out / f"olmoe_train-{__version__}-py3-none-any.whl"


def test_every_preset_chat_template_and_task_is_inside(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = {path.relative_to(REPO / "configs") for path in (REPO / "configs").rglob("*") if path.is_file()}
    assert {path.suffix for path in files} == {".yaml", ".jinja", ".jsonl"}
    assert {f"olmoe_train/configs/{path}" for path in files} <= inside
    assets = {
        path.relative_to(REPO) for path in (REPO / "olmoe_train").rglob("assets/**/*") if path.is_file()
    }
    assert {str(path) for path in assets} <= inside
    assert "report.html" in {path.name for path in assets}
    assert {name.split("/")[0] for name in inside} == {"olmoe_train", f"olmoe_train-{__version__}.dist-info"}


def test_installed_it_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    installed = run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    shown = run(
        site / "bin" / "olmoe", "train", "experiment=quickstart", "data.dir=d", "--cfg", "job",
        cwd=tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "hidden_size" in shown.stdout
    where = run(
        sys.executable, "-c", "from olmoe_train.config.reference import config_directory as d; print(d())",
        cwd=tmp_path, PYTHONPATH=str(site),
    )  # fmt: skip
    assert where.stdout.strip() == str(site / "olmoe_train" / "configs")
    program = "from olmoe_train.data.chat_template import read_template; print(read_template('tulu'))"
    template = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site))
    assert "<|assistant|>" in template.stdout
