"""A file whose time says when a rank of this node last made progress, for probes from outside the run."""

import os
from pathlib import Path

HEARTBEAT_FILE = "OLMOE_HEARTBEAT_FILE"
"""Environment variable with the file's name: on a file system in memory, because every step touches it. The
ranks of a node share one file."""


def touch_heartbeat() -> None:
    """Set the file's time to now, if the environment names a file."""
    if name := os.environ.get(HEARTBEAT_FILE):
        Path(name).touch()
