"""Sizes and intervals of `olmoe prepare` that trade memory against speed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of memory and time. None of them changes the bytes that are written."""

    batch_bytes: int = 256 * 1024
    """Text per batch. Large against the cost of sending it to a process, small against a process's share."""
    rows_per_read: int = 256
    """Rows of a table that are read at a time."""
    batches_per_process: int = 4
    """Batches per worker process that are encoded or wait to be written. Bounds memory."""
    save_seconds: float = 30.0
    """Longest time between two saved positions from which an interrupted run can continue."""


DEFAULT_LIMITS = Limits()
