"""What writing so that nothing is lost takes, wherever files are committed by a rename."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a written file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
