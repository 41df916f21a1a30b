"""Writes the output of `olmoe prepare`, and saves its progress so that an interrupted run can continue."""

import base64
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.config.choices import Records
from olmoe_train.config.data import SourceConfig
from olmoe_train.data.prepare.batches import START, Batch, Position
from olmoe_train.data.prepare.compare import LEFT_OUT, PREFERENCE_COUNTS
from olmoe_train.data.prepare.corpus import CorpusFile
from olmoe_train.data.prepare.encode import Encoded, EncodedSplit
from olmoe_train.data.prepare.limits import DEFAULT_LIMITS, Limits
from olmoe_train.data.prepare.origins import packed_origins
from olmoe_train.data.prepare.record_spec import PREFERENCES
from olmoe_train.data.prepare.records import BadRecord
from olmoe_train.data.prepare.shards import ChangedError, SplitWriter
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_write_text, fsync_path

PROGRESS = "progress.json"
QUARANTINE = "quarantine.jsonl"
# Below this number of records the share of bad ones is not representative, and is not checked.
CEILING_FROM = 1000


@dataclass
class Counts:
    """Records that were read, by what became of them. `records` is their sum."""

    documents: int = 0
    empty: int = 0
    quarantined: int = 0
    filtered: int = 0
    unaligned: int = 0
    """Documents in which the target text could not be located."""
    without_target: int = 0
    """Documents without any target token."""
    further: int = 0
    """Documents that are not the first one of their record (data.source.turns=expand)."""
    turns: dict[str, int] = field(default_factory=dict)
    """TURN_COUNTS over all documents."""
    preferences: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PREFERENCE_COUNTS, 0))
    """PREFERENCE_COUNTS."""
    longest: int = 0
    """Tokens of the longest document of preferences."""
    least_hash: int | None = None
    """Least split_hash of a document. None: no document has one."""
    greatest_hash: int | None = None

    @property
    def records_with_text(self) -> int:
        """Records that became documents, one or several each."""
        return self.documents - self.further

    @property
    def records(self) -> int:
        left_out = sum(self.preferences.get(name, 0) for name in LEFT_OUT)
        return self.records_with_text + self.empty + self.quarantined + self.filtered + left_out

    def add(self, new: EncodedSplit) -> None:
        """Add the documents of a batch."""
        self.documents += len(new.lengths)
        self.unaligned += new.unaligned
        self.without_target += new.without_target
        self.further += new.further
        self.turns = dict(Counter(self.turns) + new.turns)
        self.preferences = {name: count + new.preferences[name] for name, count in self.preferences.items()}
        self.longest = max(self.longest, new.longest)
        if new.hashes is not None:
            least, greatest = new.hashes
            self.least_hash = least if self.least_hash is None else min(self.least_hash, least)
            self.greatest_hash = greatest if self.greatest_hash is None else max(self.greatest_hash, greatest)


@dataclass(frozen=True)
class PrepareProgress:
    """Contents of progress.json in a directory that is being written."""

    settings: dict[str, Any]
    """Settings with which it was started, the state of the corpus at that time among them."""
    tokenizer_sha256: str
    position: Position
    """Everything before this position is in the shards."""
    counts: Counts
    quarantine_bytes: int
    """Length of quarantine.jsonl."""
    train: dict[str, Any] | None
    """Result of SplitWriter.save. None: nothing is encoded yet."""
    validation: dict[str, Any] | None
    held_out_below: int | None = None
    """ValidationSplit.below: the documents with a smaller split_hash are held out."""

    @classmethod
    def start(
        cls, settings: dict[str, Any], tokenizer_sha256: str, held_out_below: int | None
    ) -> "PrepareProgress":
        """Return the progress of a run that has a tokenizer and has encoded nothing."""
        return cls(settings, tokenizer_sha256, START, Counts(), 0, None, None, held_out_below)

    def write(self, directory: Path) -> None:
        """Write progress.json. After a crash, the directory holds the old or the new progress."""
        atomic_write_text(directory / PROGRESS, json.dumps(asdict(self)))


def read_progress(directory: Path, settings: dict[str, Any]) -> PrepareProgress | None:
    """Read what an interrupted run left in `directory`. None if it left nothing.

    Raises:
        ChangedError: The settings or the corpus changed since.
    """
    path = directory / PROGRESS
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    before = record["settings"]
    if changed := [key for key in {**before, **settings} if before.get(key) != settings.get(key)]:
        raise ChangedError(f"other settings than before: {', '.join(changed)}")
    position, counts = Position(**record["position"]), Counts(**record["counts"])
    return PrepareProgress(**{**record, "position": position, "counts": counts})


def delete_progress(directory: Path) -> None:
    """Delete progress.json, and what a killed process left of writing it."""
    for path in [directory / PROGRESS, *directory.glob(f".{PROGRESS}.*")]:
        path.unlink(missing_ok=True)


class OutputWriter:
    """Writes encoded batches, in order, as shards and quarantined records. Continues from saved progress."""

    def __init__(
        self,
        directory: Path,
        source: SourceConfig,
        vocab_size: int,
        dtype: np.dtype[Any],
        progress: PrepareProgress,
        files: list[CorpusFile],
        limits: Limits = DEFAULT_LIMITS,
    ):
        """Verify what `progress` says is written, and cut the files back to it.

        Args:
            directory: The directory that is being written.
            source: The `data.source` section.
            vocab_size: Token ids are below it.
            dtype: Data type of the token files.
            progress: What is written already.
            files: The files of the corpus, in the order of source_files.json.
            limits: How often progress is saved.

        Raises:
            ChangedError: A file is not as `progress` says.
        """
        self._directory = directory
        self._started = progress
        self._position = progress.position
        self._save_seconds = limits.save_seconds
        self.counts = progress.counts
        masked, labelled = source.records is not Records.text, source.records in PREFERENCES
        self._together = 2 if source.records is Records.preference else 1
        self._numbers = {file.path: number for number, file in enumerate(files)}
        self.train, self.validation = (
            SplitWriter(
                *(directory, name, source.shard_tokens, vocab_size, dtype, masked, saved, labelled),
                with_origins=True,
            )
            for name, saved in (("train", progress.train), ("validation", progress.validation))
        )
        self._quarantine = Quarantine(directory, source.max_bad_fraction, progress.quarantine_bytes)
        self._saved_at = time.monotonic()

    @property
    def shards_closed(self) -> int:
        """Number of finished shards of both splits."""
        return self.train.shards_closed + self.validation.shards_closed

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Write a batch. UserError if more than the allowed share of the records so far is bad."""
        shards = self.shards_closed
        for split, new in ((self.train, encoded.train), (self.validation, encoded.validation)):
            origins = packed_origins(new.origins, self._numbers)
            split.add(
                new.tokens, new.lengths, new.text_bytes, new.targets, new.labels, self._together, origins
            )
            self.counts.add(new)
        self.counts.empty += encoded.empty
        self.counts.filtered += encoded.filtered
        self.counts.quarantined += len(encoded.bad)
        self._quarantine.add(encoded.bad)
        self._position = batch.end
        self._quarantine.check(self.counts)
        if self.shards_closed > shards or time.monotonic() - self._saved_at > self._save_seconds:
            self._save()

    def _save(self) -> None:
        """Sync all files, then record the position. Only what is recorded here survives an interruption."""
        train, validation = self.train.save(), self.validation.save()
        self._quarantine.save()
        counts, size = self.counts, self._quarantine.size
        started = self._started
        progress = PrepareProgress(
            started.settings,
            started.tokenizer_sha256,
            self._position,
            counts,
            size,
            train,
            validation,
            started.held_out_below,
        )
        progress.write(self._directory)
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Delete the saved progress. UserError if more than the allowed share of all records is bad."""
        self._quarantine.check(self.counts, final=True)
        delete_progress(self._directory)


class Quarantine:
    """Writes quarantine.jsonl: bad records with their reasons. The file exists only if there are any."""

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
        """Append one JSON object per record: where, reason, contents (as base64 if they are not UTF-8)."""
        if not bad:
            return
        self._last = bad[-1]
        lines = "".join(
            json.dumps({"where": b.where, "reason": b.reason, **_contents(b)}) + "\n" for b in bad
        )
        with self.path.open("ab") as file:
            self.size += file.write(lines.encode())

    def save(self) -> None:
        """Force the file to the disk."""
        if self.size:
            fsync_path(self.path)

    def check(self, counts: Counts, final: bool = False) -> None:
        """Raise UserError if more than the allowed share of the records is bad. `final`: all were read."""
        records = counts.records if final else max(counts.records, CEILING_FROM)
        if counts.quarantined > self._max_fraction * records:
            last = f"\n  The last one, {self._last.where}: {self._last.reason}." if self._last else ""
            raise UserError(
                f"data.source.max_bad_fraction={self._max_fraction}: {counts.quarantined:,} of "
                f"{counts.records:,} records are bad.{last}\n"
                f"  They are in {self.path}: correct the corpus, or raise max_bad_fraction."
            )


def _contents(bad: BadRecord) -> dict[str, str]:
    try:
        return {"record": bad.record.decode("utf-8")}
    except UnicodeDecodeError:
        return {"record_base64": base64.b64encode(bad.record).decode()}
