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
from olmoe_train.utils.exit_codes import BAD_INPUT, OK


def run_directory(overrides: list[str]) -> Path:
    """The run directory that a training with these overrides uses.

    Args:
        overrides: Arguments of the training. Without run_dir=DIR among them, a preset sets the directory.

    Raises:
        UserError: There is no run_dir=DIR, and the configuration is wrong.
    """
    try:
        return Path(compose(*(word for word in overrides if not word.startswith("-"))).run_dir)
    except UserError:  # presets of another --config-dir, or arguments that are no overrides
        named = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("run_dir=")]
        if not named:
            raise
        return Path(named[-1])


def run_status(overrides: list[str]) -> dict[str, Any]:
    """The content of status.json in that directory; empty if there is none."""
    path = run_directory(overrides) / "status.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def main(overrides: list[str]) -> int:
    try:
        status = run_status(overrides)
    except UserError as error:
        print(f"error: the run directory is not known; give run_dir=DIR. {error}", file=sys.stderr)
        return BAD_INPUT
    print(*(status.get(key, "none") for key in ("state", "reason", "time")))
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
