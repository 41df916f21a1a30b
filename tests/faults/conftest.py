from pathlib import Path

import pytest

from tests.support.faults import config, run, write_data
from tests.support.ranks import run_ranks


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="session")
def twin(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of an undisturbed run of two ranks."""
    run_dir = tmp_path_factory.mktemp("twin")
    run_ranks(2, run, config(data, run_dir))
    return run_dir
