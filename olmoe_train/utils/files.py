"""Files: forcing them to the disk before a rename commits them, and JSON that has to be an object."""

import json
import os
from pathlib import Path
from typing import Any

from olmoe_train.utils.errors import UserError


def sync(path: Path) -> None:
    """Force a written file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. OSError where it cannot be read, UserError where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a JSON {type(values).__name__}, not an object")
    return values
