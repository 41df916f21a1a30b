"""Marks a run whose batches were given to train(batches=...): the documents of its steps are not known."""

import json
from pathlib import Path

OWN_BATCHES = "own_batches.json"


def note_own_batches(run_dir: Path, start_sample: int) -> None:
    """Write the mark, unless there is one. start_sample: sequences that the run was trained on before."""
    path = run_dir / OWN_BATCHES
    if not path.is_file():
        path.write_text(json.dumps({"from_sample": start_sample}) + "\n", encoding="utf-8")


def has_own_batches(run_dir: Path, sample: int) -> bool:
    """Whether the sequence with this global index may be one of those batches."""
    path = run_dir / OWN_BATCHES
    return path.is_file() and sample >= int(json.loads(path.read_text(encoding="utf-8"))["from_sample"])
