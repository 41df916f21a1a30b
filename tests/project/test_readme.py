"""The documentation's tables name tests that exist; README stays short, and its links lead somewhere."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
README = TESTS.parent / "README.md"
COMPATIBILITY = TESTS.parent / "docs" / "reference" / "compatibility.md"
MOST_LINES = 130
TABLE = re.compile(r"^\|[^|\n]+\| Test, in `tests/(\w*)/?` \|\n((?:\|.*\n)+)", re.MULTILINE)
# `parity/test_olmo.py`, `test_rope_parity.py::test_x`, or `::test_x` of the file named before it.
REFERENCE = re.compile(r"`((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?`")


def missing_tests(markdown: str) -> tuple[list[str], int]:
    """(References to tests that are not there, number of all references) in the tables with a column of
    tests."""
    missing, count = [], 0
    for folder, rows in TABLE.findall(markdown):
        file = ""
        for named, test in REFERENCE.findall(rows):
            if not named and not test:
                continue
            file, count = named or file, count + 1
            path = TESTS / folder / file
            if not path.is_file() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
                missing.append(f"{path.relative_to(TESTS)}::{test}")
    return missing, count


def test_named_tests_are_there() -> None:
    text = COMPATIBILITY.read_text(encoding="utf-8")
    missing, count = missing_tests(text)
    assert missing == []
    assert count > 30, "the tables are no longer found"


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    links += re.findall(r'src="([^":]+)"', text)
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_a_test_that_is_not_there_is_found() -> None:
    table = """| Direction | Test, in `tests/` |
|---|---|
| a | `parity/test_olmo.py`, `project/test_nothing.py` |
| b | `project/test_readme.py::test_named_tests_are_there`, `::test_gone` |
"""
    assert missing_tests(table) == (["project/test_nothing.py::", "project/test_readme.py::test_gone"], 4)
