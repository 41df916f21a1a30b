"""The seed of random draws, a local S3, and the marker `ranks`; pyproject.toml says what the markers mean."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.support import ranks

if TYPE_CHECKING:
    from tests.support.s3 import FaultyS3

TESTS = Path(__file__).parent


def starts_ranks(item: pytest.Item) -> bool:
    """Whether a test in faults/, end_to_end/ or distributed/ starts ranks. Others have a decorator."""
    match item.path.relative_to(TESTS).parts[0]:
        case "faults" | "end_to_end":
            return True
        case "distributed":
            return isinstance(item, pytest.Function) and hasattr(item.module, "run_ranks")
    return False


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if starts_ranks(item):
            item.add_marker(pytest.mark.ranks)


@pytest.hookimpl(tryfirst=True)  # before the fixtures, of which some start ranks
def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)  # draws do not depend on the tests that ran before
    ranks.allowed = item.get_closest_marker("ranks") is not None


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> "Iterator[FaultyS3]":
    """A local S3 with an empty bucket, which the environment names."""
    from tests.support.s3 import faulty_s3  # few tests need moto's server

    with faulty_s3(monkeypatch) as server:
        yield server
