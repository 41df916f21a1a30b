"""The tables of the documentation's page of metrics, from the registry."""

import re
import sys
from pathlib import Path

from olmoe_train.run.metric import Group
from olmoe_train.run.metrics_registry import METRICS


def markdown_table(group: Group) -> str:
    """The group's metrics as a Markdown table."""
    rows = [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS if m.group is group]
    return "\n".join(["| Name | Unit | Meaning |", "|---|---|---|", *rows])


def with_tables(page: str) -> str:
    """A Markdown page in which the table of each section that is named like a group is the group's table."""
    for group in Group:
        section = re.compile(
            rf"(?<=^## {group.value}$)(.*?\n)\|[^\n]*\n(?:\|[^\n]*\n)*", re.MULTILINE | re.DOTALL
        )
        if (found := section.search(page)) is not None:
            page = page[: found.end(1)] + markdown_table(group) + "\n" + page[found.end() :]
    return page


if __name__ == "__main__":
    # python -m olmoe_train.run.metrics_tables docs/reference/metrics.md
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
