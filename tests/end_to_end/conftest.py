from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import REPO, TINY, run


@dataclass(frozen=True)
class Quickstart:
    overrides: list[str]
    output: str
    data_dir: Path
    run_dir: Path
    hf_dir: Path


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """launch/quickstart.sh with a tiny model: the real corpus, two ranks, export, generation and summary."""
    home = tmp_path_factory.mktemp("quickstart")
    data_dir, run_dir = home / "data", home / "run"
    overrides = [*TINY, f"data.dir={data_dir}", f"run_dir={run_dir}"]
    result = run(REPO / "launch" / "quickstart.sh", *overrides, cwd=home)
    assert result.returncode == 0, result.stdout + result.stderr
    return Quickstart(overrides, result.stdout, data_dir, run_dir, run_dir / "hf" / "step-00000006")
