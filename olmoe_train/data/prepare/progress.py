"""What preparing writes: shards, quarantined records, counts, and how far it has come, to go on from after a
kill."""

import base64
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.config.choices import Records
from olmoe_train.config.data import SourceConfig
from olmoe_train.data.prepare.batches import START, Batch, Position
from olmoe_train.data.prepare.encode import Encoded
from olmoe_train.data.prepare.records import BadRecord
from olmoe_train.data.prepare.shards import ChangedError, SplitWriter, replace_durably
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import sync

PROGRESS = "progress.json"
QUARANTINE = "quarantine.jsonl"
# Longest time between two places to go on from.
SAVE_SECONDS = 30.0
# Below so many records the share of bad ones says little, and the ceiling waits.
CEILING_FROM = 1000


@dataclass
class Counts:
    documents: int = 0
    empty: int = 0
    quarantined: int = 0
    filtered: int = 0
    unaligned: int = 0
    without_target: int = 0

    @property
    def records(self) -> int:
        return self.documents + self.empty + self.quarantined + self.filtered


@dataclass(frozen=True)
class Done:
    """progress.json of a directory that is being written."""

    settings: dict[str, Any]
    """With which it was begun, the corpus as it was then among them."""
    tokenizer_sha256: str
    position: Position
    """What is before it is in the shards."""
    counts: Counts
    quarantine_bytes: int
    """Length of quarantine.jsonl."""
    train: dict[str, Any] | None
    """SplitWriter.save; None: not begun."""
    validation: dict[str, Any] | None

    def write(self, directory: Path) -> None:
        replace_durably(directory / PROGRESS, json.dumps(asdict(self)))


def begun(settings: dict[str, Any], tokenizer_sha256: str) -> Done:
    """The tokenizer is there and nothing is encoded."""
    return Done(settings, tokenizer_sha256, START, Counts(), 0, None, None)


def read_done(directory: Path, settings: dict[str, Any]) -> Done | None:
    """What an interrupted run with the same settings left in `directory`, if any.

    Raises ChangedError with the reason where it left something that cannot be gone on from.
    """
    path = directory / PROGRESS
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    there = record["settings"]
    if changed := [key for key in {**there, **settings} if there.get(key) != settings.get(key)]:
        raise ChangedError(f"other than before: {', '.join(changed)}")
    position, counts = Position(**record["position"]), Counts(**record["counts"])
    return Done(**{**record, "position": position, "counts": counts})


class Output:
    """Takes encoded batches in order; what `done` says is there already is verified and kept."""

    def __init__(
        self,
        directory: Path,
        source: SourceConfig,
        vocab_size: int,
        dtype: np.dtype[Any],
        done: Done,
    ):
        """Raises ChangedError where the files are not as `done` says."""
        self._directory = directory
        self._begun = done
        self._position = done.position
        self.counts = done.counts
        masked = source.records is not Records.text
        self.train, self.validation = (
            SplitWriter(directory, name, source.shard_tokens, vocab_size, dtype, masked, progress)
            for name, progress in (("train", done.train), ("validation", done.validation))
        )
        self._quarantine = Quarantine(directory, source.max_bad_fraction, done.quarantine_bytes)
        self._saved_at = time.monotonic()

    @property
    def shards_closed(self) -> int:
        return self.train.shards_closed + self.validation.shards_closed

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """UserError when more than the allowed share of records is bad."""
        shards = self.shards_closed
        for split, new in ((self.train, encoded.train), (self.validation, encoded.validation)):
            split.add(new.tokens, new.lengths, new.text_bytes, new.targets)
            self.counts.documents += len(new.lengths)
            self.counts.unaligned += new.unaligned
            self.counts.without_target += new.without_target
        self.counts.empty += encoded.empty
        self.counts.filtered += encoded.filtered
        self.counts.quarantined += len(encoded.bad)
        self._quarantine.add(encoded.bad)
        self._position = batch.end
        self._quarantine.check(self.counts)
        if self.shards_closed > shards or time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        """The one moment at which what is written counts as done."""
        train, validation = self.train.save(), self.validation.save()
        self._quarantine.save()
        counts, size = self.counts, self._quarantine.size
        sha256 = self._begun.tokenizer_sha256
        done = Done(self._begun.settings, sha256, self._position, counts, size, train, validation)
        done.write(self._directory)
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """UserError as `add`, of all records. What was only to go on from is deleted."""
        self._quarantine.check(self.counts, final=True)
        (self._directory / PROGRESS).unlink(missing_ok=True)


class Quarantine:
    """quarantine.jsonl: bad records with their reasons. Written as it fills, and there only if it has any."""

    def __init__(self, directory: Path, max_fraction: float, kept_bytes: int):
        self.path = directory / QUARANTINE
        self._max_fraction = max_fraction
        self._last: BadRecord | None = None
        self.size = kept_bytes
        if kept_bytes:
            with self.path.open("r+b") as file:
                file.truncate(kept_bytes)
        else:
            self.path.unlink(missing_ok=True)

    def add(self, bad: list[BadRecord]) -> None:
        """A JSON object a record: where, reason, and its contents as text or, where they are none, base64."""
        if not bad:
            return
        self._last = bad[-1]
        lines = "".join(
            json.dumps({"where": b.where, "reason": b.reason, **_contents(b)}) + "\n" for b in bad
        )
        with self.path.open("ab") as file:
            self.size += file.write(lines.encode())

    def save(self) -> None:
        if self.size:
            sync(self.path)

    def check(self, counts: Counts, final: bool = False) -> None:
        """UserError when more than the allowed share of the records so far is bad; `final`: of all."""
        records = counts.records if final else max(counts.records, CEILING_FROM)
        if counts.quarantined > self._max_fraction * records:
            last = f"\n  The last one, {self._last.where}: {self._last.reason}." if self._last else ""
            raise UserError(
                f"data.source.max_bad_fraction={self._max_fraction}: {counts.quarantined:,} of "
                f"{counts.records:,} records are bad.{last}\n"
                f"  They are in {self.path}: correct the corpus, or raise the ceiling."
            )


def _contents(bad: BadRecord) -> dict[str, str]:
    try:
        return {"record": bad.record.decode("utf-8")}
    except UnicodeDecodeError:
        return {"record_base64": base64.b64encode(bad.record).decode()}
