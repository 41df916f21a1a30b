"""What a part of benchmarks/on_gpu.py reports: rows of a table, and the reason why it was skipped."""

from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    """What became of a row or of a part."""

    passed = "passed"
    """A number within its tolerance."""
    failed = "FAILED"
    """A number beyond its tolerance, an error, or no time left."""
    measured = "measured"
    """A number that nothing is held against."""
    skipped = "skipped"
    """Not done; the row says why."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    status: Status
    value: float | str | None = None
    unit: str = ""
    tolerance: float | None = None
    """The greatest value that passes."""
    reason: str = ""
    """Why it failed or was skipped."""


class Skip(Exception):  # noqa: N818 - no error
    """Raised by a part that cannot run here; the message is the reason."""


@dataclass
class Report:
    """Collects the rows of one part."""

    rows: list[Row] = field(default_factory=list)

    def check(self, what: str, value: float, tolerance: float, reason: str = "") -> None:
        """An error that passes up to a tolerance. NaN fails. reason: what a failure is about."""
        passed = value <= tolerance
        status = Status.passed if passed else Status.failed
        self.rows.append(Row(what, status, value, "", tolerance, "" if passed else reason))

    def measure(self, what: str, value: float | str, unit: str = "") -> None:
        self.rows.append(Row(what, Status.measured, value, unit))

    def skip(self, what: str, reason: str) -> None:
        self.rows.append(Row(what, Status.skipped, reason=reason))

    @property
    def status(self) -> Status:
        """failed if any row failed; skipped if nothing was done."""
        found = {row.status for row in self.rows}
        for status in (Status.failed, Status.passed, Status.measured):
            if status in found:
                return status
        return Status.skipped
