"""What the run directory says about how a training ended, for launchers and schedulers.

    python -m olmoe_train.cli.run_status experiment=... run_dir=...

takes the overrides of the training and prints one line: state, reason, and the time when they were written.
"""

import json
import sys
from pathlib import Path
from typing import Any

from olmoe_train.config import compose
from olmoe_train.utils.errors import UserError


def run_directory(overrides: list[str]) -> Path | None:
    """The run directory that a training with these overrides uses, or None if that cannot be known.

    Args:
        overrides: Arguments of the training. Without run_dir=DIR among them, a preset sets the directory.
    """
    try:
        return Path(compose(*(word for word in overrides if not word.startswith("-"))).run_dir)
    except UserError:  # presets of another --config-dir, or arguments that are no overrides
        named = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("run_dir=")]
        return Path(named[-1]) if named else None


def run_status(overrides: list[str]) -> dict[str, Any]:
    """The content of status.json in that directory; empty if there is none."""
    directory = run_directory(overrides)
    if directory is None or not (directory / "status.json").is_file():
        return {}
    return dict(json.loads((directory / "status.json").read_text()))


def main(overrides: list[str]) -> None:
    status = run_status(overrides)
    print(*(status.get(key, "none") for key in ("state", "reason", "time")))


if __name__ == "__main__":
    main(sys.argv[1:])
