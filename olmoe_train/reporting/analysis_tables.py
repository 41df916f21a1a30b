"""The results of `olmoe analyze` in a report: every matrix and table of RUN/analysis/analysis.json by its
name.

The walk knows no analysis: a list of equally long lists of numbers is a matrix, a list of objects or an
object of plain values is a table, and other objects are walked through. Analyses that come later appear by
themselves.
"""

from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.reporting.downsample import encode, linear_levels, rounded
from olmoe_train.reporting.run_data import read_object

ANALYSIS = Path("analysis") / "analysis.json"
MOST_CELLS, MOST_ROWS, MOST_PARTS = 150_000, 200, 60
"""Limits of a matrix, of a table, and of the number of both: a report stays under 2 MB."""


def analysis_parts(run_dir: Path) -> list[dict[str, Any]]:
    """The matrices and tables of a run's analyses; empty if there are none.

    Returns:
        {"name", "kind": "matrix", "rows", "columns", "low", "high", "levels"} with base64 of [rows, columns],
        or {"name", "kind": "table", "columns": [...], "cells": [[...], ...]} with values for people.
    """
    parts: list[dict[str, Any]] = []
    _walk("", read_object(run_dir / ANALYSIS), parts)
    return parts[:MOST_PARTS]


def _walk(name: str, value: Any, parts: list[dict[str, Any]]) -> None:
    if (matrix := _matrix(name, value)) is not None:
        parts.append(matrix)
    elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        columns = list(dict.fromkeys(key for row in value for key in row if _is_plain(row[key])))
        cells = [[_shown(row.get(column)) for column in columns] for row in value[:MOST_ROWS]]
        if columns:
            parts.append({"name": name, "kind": "table", "columns": columns, "cells": cells})
    elif isinstance(value, dict):
        plain = [[str(key), _shown(item)] for key, item in value.items() if _is_plain(item)]
        if plain:
            parts.append({"name": name, "kind": "table", "columns": ["", ""], "cells": plain[:MOST_ROWS]})
        for key, item in value.items():
            if isinstance(item, dict | list) and not _is_plain(item):
                _walk(f"{name} / {key}" if name else str(key), item, parts)


def _matrix(name: str, value: Any) -> dict[str, Any] | None:
    if not isinstance(value, list) or not value or not isinstance(value[0], list):
        return None
    try:
        values_RC = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return None
    if values_RC.ndim != 2 or not 0 < values_RC.size <= MOST_CELLS:
        return None
    finite = values_RC[np.isfinite(values_RC)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    rows, columns = values_RC.shape
    return {
        "name": name,
        "kind": "matrix",
        "rows": rows,
        "columns": columns,
        "low": rounded(low),
        "high": rounded(high),
        "levels": encode(linear_levels(values_RC, low, high)),
    }


def _is_plain(value: Any) -> bool:
    """Whether a table shows the value in one cell: a scalar, or a short list of scalars."""
    if isinstance(value, list):
        return len(value) <= 32 and all(item is None or isinstance(item, str | int | float) for item in value)
    return value is None or isinstance(value, str | int | float)


def _shown(value: Any) -> str | int | float | None:
    if isinstance(value, list):
        return ", ".join(str(_shown(item)) for item in value)
    return rounded(value) if isinstance(value, float) else value
