"""Hugging Face directories in an object store: their files, in a cache of this machine."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

from olmoe_train.model.hf.hub import PICKLE_FILES, SMALL_FILES, WEIGHT_FILES
from olmoe_train.utils import object_store
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.files import atomic_write_text, file_lock
from olmoe_train.utils.object_store import cached_directory, join
from olmoe_train.utils.redaction import redact_text

_VERSIONS = ".versions.json"


def remote_directory(url: str, trust_pickle: bool = False, weights: bool = True, key: str = "source") -> Path:
    """The directory of this machine with the files of an HF directory in a store.

    Files that the store has changed are read again. Processes of one machine wait for each other.

    Args:
        url: The HF directory.
        trust_pickle: Whether weights in a pickle are wanted.
        weights: Whether the weights are wanted, and not only configuration and tokenizer.
        key: The configuration key that names the URL, for messages.

    Raises:
        UserError: There is no HF directory, or it cannot be read.
        StoreError: The store does not answer.
    """
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    patterns = (
        SMALL_FILES + (WEIGHT_FILES if weights else ()) + (PICKLE_FILES if weights and trust_pickle else ())
    )
    directory = cached_directory("models", url)
    with file_lock(directory / ".lock"):
        there = object_store.list_versions(url)
        if "config.json" not in there:
            raise UserError(f"{key}={redact_text(url)}: not an HF directory (no config.json)")
        path = directory / _VERSIONS
        have: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in have.keys() - there.keys():
            (directory / name).unlink(missing_ok=True)
        for name, (size, version) in there.items():
            is_wanted = any(fnmatch(name, pattern) for pattern in patterns)
            if is_wanted and not (have.get(name) == version and (directory / name).is_file()):
                _bring(join(url, name), directory / name, size, version)
                have[name] = version
                atomic_write_text(path, json.dumps(have))
    return directory


def _bring(url: str, path: Path, size: int, version: str) -> None:
    digest = hashlib.sha256(version.encode()).hexdigest()[:8]
    partial = path.with_name(f".{path.name}.{digest}.part")  # continues only a download of this version
    object_store.download(url, partial, size)
    partial.replace(path)
