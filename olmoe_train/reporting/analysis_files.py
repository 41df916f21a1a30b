"""The files of a router analysis: analysis.json, tables as CSV, and pictures as SVG.

docs/concepts/router-analyses.md describes the format.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoe_train.reporting.analysis_pictures import pictures
from olmoe_train.reporting.analysis_record import Record
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_directory

ANALYSIS = "analysis.json"
NOT_ALWAYS = (
    "saturation.csv",
    "saturation.svg",
    "vocabulary.csv",
    "vocabulary.svg",
    "vocabulary_experts.csv",
    "domains_top_1.svg",
)
"""Files that an analysis with fewer parts than an earlier one does not replace."""
Rows = Iterator[tuple[Any, ...]]


def check_out(out: Path) -> None:
    """Refuse to write beside files of something else.

    Raises:
        UserError: `out` is a file, or holds files and no analysis.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / ANALYSIS).is_file():
        raise UserError(f"out={out}: holds files, but no {ANALYSIS} of an earlier analysis; give another one")
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: is a file; give a directory")


def write_analysis(record: Record, out: Path) -> list[str]:
    """Write all files of an analysis. They replace those of an earlier one; analysis.json comes last.

    Returns:
        The names of the files.
    """
    with atomic_directory(out, last=ANALYSIS) as partial:
        for name, text in pictures(record).items():
            (partial / name).write_text(text, encoding="utf-8")
        for name, (header, rows) in tables(record).items():
            file = io.StringIO()
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
            (partial / name).write_text(file.getvalue(), encoding="utf-8")
        (partial / ANALYSIS).write_text(as_json(record), encoding="utf-8")
        written = sorted(path.name for path in partial.iterdir())
    for name in set(NOT_ALWAYS) - set(written):
        (out / name).unlink(missing_ok=True)
    return written


def as_json(record: Record) -> str:
    """JSON with one line per entry of a section: matrices would have one line per number."""
    parts = []
    for key, value in record.items():
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            entries = [json.dumps(one, separators=(",", ":"), ensure_ascii=False) for one in value]
            text = "[\n  " + ",\n  ".join(entries) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def tables(record: Record) -> dict[str, tuple[tuple[str, ...], Rows]]:
    """File name -> (header, rows) of the CSV tables. A source is called by its name."""
    found: dict[str, tuple[tuple[str, ...], Rows]] = {
        "saturation.csv": (("source", "k", "layer", "saturation", "chance"), _saturation(record)),
        "coactivation.csv": (
            ("source", "rule", "layer", "expert", "with_expert", "share"),
            _coactivation(record),
        ),
        "domains.csv": (("source", "domain", "k", "layer", "expert", "share", "uniform"), _domains(record)),
        "vocabulary.csv": (
            ("source", "tokens", "k", "layer", "mean", "min_count", "ids", "mean_of_all_ids", "all_ids"),
            _vocabulary(record),
        ),
        "vocabulary_experts.csv": (
            ("source", "layer", "expert", "tokens", "id", "text", "share", "occurrences"),
            _vocabulary_experts(record),
        ),
        "importance.csv": (
            ("source", "layer", "expert", "frequency", "mean_gate", "mean_weighted_norm", "contribution"),
            _importance(record),
        ),
    }
    return {name: table for name, table in found.items() if record[name.removesuffix(".csv")]}


def _name(record: Record, entry: Record) -> str:
    return str(record["sources"][entry["source"]]["name"])


def _saturation(record: Record) -> Rows:
    for entry in record["saturation"]:
        for layer, value in enumerate(entry["by_layer"]):
            yield _name(record, entry), entry["k"], layer, value, entry["chance"]


def _coactivation(record: Record) -> Rows:
    for entry in record["coactivation"]:
        for one in entry["layers"]:
            for i, row in enumerate(one["matrix"]):
                for j, share in enumerate(row):
                    if i != j:
                        yield _name(record, entry), entry["rule"], one["layer"], i, j, share


def _domains(record: Record) -> Rows:
    for entry in record["domains"]:
        for layer, shares in enumerate(entry["by_layer"]):
            for expert, share in enumerate(shares):
                yield (
                    *(_name(record, entry), entry["domain"], entry["k"]),
                    *(layer, expert, share, entry["uniform"]),
                )


def _vocabulary(record: Record) -> Rows:
    for entry in record["vocabulary"]:
        for layer, mean in enumerate(entry["by_layer"]):
            yield (
                *(_name(record, entry), entry["tokens"], entry["k"], layer, mean, entry["min_count"]),
                *(entry["ids"], entry["by_layer_all_ids"][layer], entry["all_ids"]),
            )


def _vocabulary_experts(record: Record) -> Rows:
    for entry in record["vocabulary_experts"]:
        for kind in ("input", "predicted"):
            for token in entry[f"{kind}_tokens"]:
                yield (
                    *(_name(record, entry), entry["layer"], entry["expert"], kind),
                    *(token["id"], token["text"], token["share"], token["occurrences"]),
                )


def _importance(record: Record) -> Rows:
    for entry in record["importance"]:
        values = [entry[key] for key in ("frequency", "mean_gate", "mean_weighted_norm", "contribution")]
        for layer, rows in enumerate(zip(*values, strict=True)):
            for expert, numbers in enumerate(zip(*rows, strict=True)):
                yield _name(record, entry), layer, expert, *numbers
