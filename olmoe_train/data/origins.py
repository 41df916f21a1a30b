"""Where the documents of a step came from: source, file and line of each token of a sequence.

Nothing is stored per step. The order of the samples is a function of the seed and the index
(sample_order.py), a sequence is a list of ranges of tokens (sequences.py), and the document index says which
documents these are. Prepared data records the file and the line of each document.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from olmoe_train.data.manifest import LINE_BITS, SOURCE_FILES, damaged
from olmoe_train.data.sequences import Sequences
from olmoe_train.data.tokens import TokenSplit


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of a sequence, which hold tokens of one document."""

    start: int
    stop: int
    document: int
    """Number of the document in its split."""


@dataclass(frozen=True)
class Origin:
    """Where a document is, and where it came from."""

    shard: str
    """Token file, relative to the prepared directory."""
    document: int
    """Number of the document in the shard, from 0."""
    file: str | None
    """File of the corpus; DATASET:SPLIT of a streamed dataset. None: prepared data does not say."""
    line: int | None
    """Line or row of the file, from 1."""

    def __str__(self) -> str:
        if self.file is None:
            return f"document {self.document} of {self.shard}"
        return f"{self.file}:{self.line}"


def segments(sequences: Sequences, index: int) -> list[Segment]:
    """List the documents of sequence `index`, in the order of its positions. Padding is in no segment."""
    found: list[Segment] = []
    at = 0
    for start, stop in sequences.pieces(index):
        edges = [start, *sequences.split.document_starts(start, stop).tolist(), stop]
        document = sequences.split.document_at(start)
        for number, (first, last) in enumerate(pairwise(edges)):
            found.append(Segment(at + first - start, at + last - start, document + number))
        at += stop - start
    return found


class Origins:
    """Reads the origins of the documents of one split."""

    def __init__(self, split: TokenSplit) -> None:
        self.split = split
        self._files: list[str] | None = None

    def of(self, document: int) -> Origin:
        """Return the origin of a document of the split.

        Raises:
            UserError: The list of the corpus's files is missing or damaged.
        """
        shard, number, packed = self.split.packed_origin(document)
        if packed is None:
            return Origin(shard.path, number, None, None)
        files = self._source_files()
        file, line = packed >> LINE_BITS, packed & ((1 << LINE_BITS) - 1)
        if file >= len(files):
            path = self.split.directory / str(shard.origins_path)
            raise damaged(path, f"it names file {file:,} of {len(files):,}", self.split.directory)
        return Origin(shard.path, number, files[file], line)

    def why_missing(self) -> str | None:
        """Say why the data has no files and lines. None: it has them."""
        manifest, directory = self.split.manifest, self.split.directory
        if all(shard.origins_path is not None for shard in self.split.shards):
            return None
        if manifest.tokens_in_place:
            return f"{directory} is an index of token files, which do not say where their documents came from"
        return (
            f"{directory} was prepared by an older version, which did not record files and lines; prepare "
            "the corpus again, with the same settings, in another directory, and give that as data_dir"
        )

    def _source_files(self) -> list[str]:
        if self._files is None:
            listed = self.split.manifest.source_files
            path = self.split.directory / (listed.path if listed is not None else SOURCE_FILES)
            self._files = _read_source_files(path, self.split.directory)
        return self._files


def _read_source_files(path: Path, directory: Path) -> list[str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(path, "missing", directory) from None
    except ValueError as error:
        raise damaged(path, f"not a JSON list: {error}", directory) from None
    return [str(file) for file in files]
