"""The seed of random draws, and the marker `ranks`. The other marker and what both mean: pyproject.toml."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.support import ranks

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
