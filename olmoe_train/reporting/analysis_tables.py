"""The results of `olmoe analyze` in a report: the matrices and tables of RUN/analysis/analysis.json by their
names.

The walk knows forms, not analyses, so that analyses that come later appear by themselves. In a list of
entries, such as one per domain, plain values are a table; equally long lists of numbers are the rows of a
matrix; and matrices of one size are one heat map with a choice of the entry.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from olmoe_train.reporting.downsample import encode, linear_levels, rounded
from olmoe_train.reporting.run_data import read_object

ANALYSIS = Path("analysis") / "analysis.json"
MOST_CELLS, MOST_ROWS, MOST_PARTS = 400_000, 200, 40
"""Limits of all matrices, of a table, and of the number of parts: a report stays under 2 MB."""
LEAST_COLUMNS = 4
"""Fewer columns are records of a list, such as (expert, expert, share), and no matrix."""

Part = dict[str, Any]
Matrix = NDArray[np.float64]


def analysis_parts(run_dir: Path) -> list[Part]:
    """The matrices and tables of a run's analyses; empty if there are none.

    Returns:
        {"name", "kind": "matrix", "rows", "columns", "low", "high", "row_labels", "row_title",
        "column_title", "options": names of the matrices, "levels": base64 of [rows, columns] for each},
        or
        {"name", "kind": "table", "columns": [...], "cells": [[...], ...]} with values for people.
    """
    parts: list[Part] = []
    for key, value in read_object(run_dir / ANALYSIS).items():
        _walk(str(key), value, parts)
    kept, cells = [], 0
    for part in parts[:MOST_PARTS]:
        cells += part["rows"] * part["columns"] * len(part["options"]) if part["kind"] == "matrix" else 0
        if cells <= MOST_CELLS:
            kept.append(part)
    return kept


def _walk(name: str, value: Any, parts: list[Part]) -> None:
    if (values := _matrix(value)) is not None:
        parts.append(_matrix_part(name, [""], [values], [str(row) for row in range(len(values))]))
    elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        _walk_entries(name, value, parts)
    elif isinstance(value, dict):
        plain = [[str(key), _shown(item)] for key, item in value.items() if _is_plain(item)]
        if plain:
            parts.append({"name": name, "kind": "table", "columns": ["", ""], "cells": plain[:MOST_ROWS]})
        for key, item in value.items():
            _walk(f"{name}: {key}", item, parts)


def _walk_entries(name: str, entries: list[dict[str, Any]], parts: list[Part]) -> None:
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    columns = [key for key in keys if all(_is_plain(entry.get(key)) for entry in entries)]
    if len(columns) > 1:  # one column alone numbers the entries
        cells = [[_shown(entry.get(column)) for column in columns] for entry in entries[:MOST_ROWS]]
        parts.append({"name": name, "kind": "table", "columns": columns, "cells": cells})
    labels = _labels(entries)
    for key in (key for key in keys if key not in columns):
        found = [entry.get(key) for entry in entries]
        matrices = [_matrix(item) for item in found]
        same = [(label, one) for label, one in zip(labels, matrices, strict=True) if one is not None]
        rows = [_row(item) for item in found]
        if same and len({one.shape for _, one in same}) == 1:
            row_labels = [str(row) for row in range(len(same[0][1]))]
            named, values = [label for label, _ in same], [one for _, one in same]
            parts.append(_matrix_part(f"{name}: {key}", named, values, row_labels))
        elif all(row is not None for row in rows) and len({len(row) for row in rows if row is not None}) == 1:
            parts.append(_matrix_part(f"{name}: {key}", [""], [np.asarray(rows, np.float64)], labels))
        else:
            for label, item in zip(labels, found, strict=True):
                if isinstance(item, list) and item and isinstance(item[0], dict):
                    _walk_entries(f"{name}: {label}", item, parts)


def _matrix(value: Any) -> Matrix | None:
    """Equally long lists of numbers, with NaN for null; None: the value is something else."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        return None
    try:
        values_RC = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return None
    return values_RC if values_RC.ndim == 2 and values_RC.shape[1] >= LEAST_COLUMNS else None


def _row(value: Any) -> list[float | None] | None:
    """A list of measurements. Whole numbers alone are ids or counts."""
    if not isinstance(value, list) or not any(isinstance(item, float) for item in value):
        return None
    return value if all(item is None or isinstance(item, int | float) for item in value) else None


def _matrix_part(name: str, options: list[str], values: list[Matrix], row_labels: list[str]) -> Part:
    finite = np.concatenate([one[np.isfinite(one)] for one in values])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    rows, columns = values[0].shape
    is_square, of_entries = rows == columns, len(values) == 1 and row_labels != [str(r) for r in range(rows)]
    return {
        "name": name,
        "kind": "matrix",
        "rows": rows,
        "columns": columns,
        "low": rounded(low),
        "high": rounded(high),
        "row_labels": row_labels,
        "row_title": "" if of_entries else "expert" if is_square else "layer",
        "column_title": "layer" if of_entries else "expert",
        "options": options,
        "levels": [encode(linear_levels(one, low, high)) for one in values],
    }


def _labels(entries: list[dict[str, Any]]) -> list[str]:
    """What distinguishes the entries: texts and whole numbers that are not the same in all of them."""
    keys = [key for key, item in entries[0].items() if isinstance(item, str | int)]
    if len(entries) > 1:
        keys = [key for key in keys if len({entry.get(key) for entry in entries}) > 1]
    named = [[(key, entry.get(key)) for key in keys] for entry in entries]
    return [
        ", ".join(item if isinstance(item, str) else f"{key} {item}" for key, item in one) for one in named
    ]


def _is_plain(value: Any) -> bool:
    """Whether a table shows the value in one cell: a scalar, or a short list of texts or objects with one."""
    if isinstance(value, list):
        return len(value) <= 20 and all(isinstance(item, str) or "text" in _keys(item) for item in value)
    return value is None or isinstance(value, str | int | float)


def _keys(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _shown(value: Any) -> str | int | float | None:
    if isinstance(value, list):
        return "   ".join(str(_shown(item)) for item in value)
    if isinstance(value, dict):
        share = value.get("share")
        return f"{value['text']!r}" + (f" {share:.0%}" if isinstance(share, float) else "")
    return rounded(value) if isinstance(value, float) else value
