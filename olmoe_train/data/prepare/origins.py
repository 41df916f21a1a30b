"""Records where documents came from: the list of the corpus's files, and file and line of each document."""

import hashlib
import json
from pathlib import Path

import numpy as np

from olmoe_train.data.manifest import LINE_BITS, ORIGINS_DTYPE, SOURCE_FILES, SourceFiles
from olmoe_train.data.prepare.open_corpus import Corpus
from olmoe_train.utils.redaction import redact_text


def packed_origins(origins: list[tuple[str, int]], numbers: dict[str, int]) -> np.ndarray:
    """Pack (path, line) of each document into one integer.

    Args:
        origins: Path and line of each document.
        numbers: Number of each file, by its path.

    Returns:
        uint64 [documents]: number of the file x 2^LINE_BITS + line.
    """
    packed = [(numbers[path] << LINE_BITS) + line for path, line in origins]
    return np.array(packed, ORIGINS_DTYPE)


def write_source_files(directory: Path, corpus: Corpus) -> SourceFiles:
    """Write the list of the corpus's files, in the order of their numbers, and return its description.

    A split of a streamed dataset is written as DATASET:SPLIT.
    """
    prefix = f"{corpus.hub.name}:" if corpus.hub is not None else ""
    paths = [redact_text(f"{prefix}{file.path}") for file in corpus.files]
    contents = (json.dumps(paths, indent=0) + "\n").encode()
    (directory / SOURCE_FILES).write_bytes(contents)
    return SourceFiles(SOURCE_FILES, len(paths), hashlib.sha256(contents).hexdigest())
