import fcntl
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
def quickstart(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Quickstart:
    """launch/quickstart.sh with a tiny model: the real corpus, two ranks, export, generation and summary.

    Workers of pytest-xdist share one run: the first makes it, and the others wait.
    """
    own = tmp_path_factory.getbasetemp()
    home = (own if worker_id == "master" else own.parent) / "quickstart"
    home.mkdir(exist_ok=True)
    data_dir, run_dir, printed = home / "data", home / "run", home / "output.txt"
    overrides = [*TINY, f"data.dir={data_dir}", f"run_dir={run_dir}"]
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            result = run(REPO / "launch" / "quickstart.sh", *overrides, cwd=home)
            assert result.returncode == 0, result.stdout + result.stderr
            printed.write_text(result.stdout)
    return Quickstart(overrides, printed.read_text(), data_dir, run_dir, run_dir / "hf" / "step-00000006")
