"""Finds and identifies the corpus that data.source describes, before any of it is read."""

import platform
import sysconfig
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from olmoe_train.config.choices import LearnedTurns, Records, SourceKind, Truncate, Turns
from olmoe_train.config.data import SourceConfig
from olmoe_train.data.prepare.corpus import CorpusFile, FileFormat, digest, find_files, python_stdlib_files
from olmoe_train.data.prepare.hub import HubDataset, hub_splits, open_hub_dataset
from olmoe_train.data.prepare.record_spec import CONTENT_KEYS, CONVERSATIONS, PREFERENCES
from olmoe_train.utils.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """The files to prepare."""

    files: list[CorpusFile]
    """In the order in which they are read."""
    hub: HubDataset | None
    """The dataset that files of FileFormat.hub are splits of."""
    description: str
    """For people."""

    @property
    def has_validation_files(self) -> bool:
        """Whether validation has its own files. Otherwise documents are chosen by a hash."""
        return any(file.validation for file in self.files)

    @property
    def size(self) -> int | None:
        """Bytes on disk. None if it is unknown."""
        return sum(file.size for file in self.files) or None

    def fingerprint(self) -> str:
        """Hash of names and sizes: the same for a copy of the corpus, different if files come, go or grow."""
        rows = [[file.name, file.size, file.validation] for file in self.files]
        return digest([self.hub.fingerprint if self.hub else None, *rows])

    def fingerprint_in_place(self) -> str:
        """Hash that also covers paths and modification times. An interrupted run continues only if equal."""
        return digest([self.fingerprint(), *([file.path, file.modified_ns] for file in self.files)])


def source_errors(source: SourceConfig) -> list[str]:
    """Return the errors in the keys that say where the corpus is, one message per error."""
    kind = f"data.source.kind={source.kind.value}"
    if source.kind is SourceKind.files and not source.paths:
        return [
            "data.source.paths=[]: give files, globs or directories: 'data.source.paths=[corpus/*.jsonl]'"
        ]
    if source.kind is SourceKind.datasets and bool(source.paths) == (source.name is not None):
        return [f"{kind}: give one of data.source.name (a dataset) and data.source.paths (parquet and arrow)"]
    unused = {
        "name": source.kind is not SourceKind.datasets,
        "paths": source.kind is SourceKind.python_stdlib,
        "validation_paths": not source.paths,
        "keep": source.kind is SourceKind.python_stdlib,
    }
    errors = [
        f"data.source.{key}={value}: has no effect with {kind}; see data=jsonl and data=hf"
        for key, is_unused in unused.items()
        if is_unused and (value := getattr(source, key))
    ]
    errors += _preference_errors(source)
    if source.records not in (*CONVERSATIONS, *PREFERENCES):
        errors += [
            f"data.source.{key}={value}: has no effect with data.source.records={source.records.value}"
            for key, value in changed_conversation_keys(source).items()
        ]
    if source.records is not Records.text and source.kind is SourceKind.python_stdlib:
        errors.append(
            f"data.source.records={source.records.value}: {kind} has only text files; see data=chat"
        )
    return errors


# The kind of records that reads each key. A key at its default is no error anywhere.
_PREFERENCE_FIELDS = {
    "chosen_field": Records.preference,
    "rejected_field": Records.preference,
    "label_field": Records.unpaired_preference,
}


def _preference_errors(source: SourceConfig) -> list[str]:
    """What is wrong with the keys of preferences, and of other records that only preferences take."""
    records = f"data.source.records={source.records.value}"
    learn = f"data.source.learn={source.learn.value}"
    errors = [
        f"data.source.{key}={getattr(source, key)}: has no effect with {records}"
        for key, reader in _PREFERENCE_FIELDS.items()
        if source.records is not reader and getattr(source, key) != getattr(SourceConfig, key)
    ]
    if source.records not in PREFERENCES:
        if source.learn is LearnedTurns.completion and source.records in CONVERSATIONS:
            errors.append(f"{learn}: is for preferences (data=preference); set all, last or marked")
        if source.truncate is not Truncate.drop:
            errors.append(f"data.source.truncate={source.truncate.value}: has no effect with {records}")
        return errors
    if source.learn is LearnedTurns.marked:
        errors.append(f"{learn}: {records} compares whole completions; set completion, all or last")
    if source.learn is LearnedTurns.all and source.records is Records.unpaired_preference:
        errors.append(f"{learn}: {records} compares completions without their prompts; set completion")
    if source.turns is not Turns.together:
        errors.append(f"data.source.turns={source.turns.value}: has no effect with {records}")
    if source.input_field != SourceConfig.input_field:
        errors.append(f"data.source.input_field={source.input_field}: has no effect with {records}")
    return errors


def changed_conversation_keys(source: SourceConfig) -> dict[str, Any]:
    """Return the keys for conversations that are not at their defaults, with their values as in YAML."""
    keys = ("learn", "turns", "input_field", "tools_field", "template_kwargs_field")
    changed = {
        key: getattr(source, key) for key in keys if getattr(source, key) != getattr(SourceConfig, key)
    }
    return {key: value.value if isinstance(value, Enum) else value for key, value in changed.items()}


def open_corpus(source: SourceConfig) -> Corpus:
    """Find the files of the corpus.

    Raises:
        UserError: Files or the dataset are missing, or do not fit the other keys of data.source.
    """
    if source.kind is SourceKind.python_stdlib:
        version = f"{platform.python_implementation()} {platform.python_version()}"
        files = python_stdlib_files(Path(sysconfig.get_paths()["stdlib"]))
        return Corpus(files, None, f"the standard library of {version}")
    if source.name is not None:
        hub = open_hub_dataset(source.name, source.subset, source.revision)
        names = ", ".join(f"{k}={v}" for k in ("subset", "revision", "split") if (v := getattr(source, k)))
        splits = hub_splits(hub, source.split, source.validation_split)
        return Corpus(splits, hub, f"dataset {source.name} ({names})")
    files = find_files(source.paths, source.validation_paths)
    texts = [file.path for file in files if file.format is FileFormat.text]
    if texts and source.records is not Records.text:
        raise UserError(
            f"data.source.records={source.records.value}: {texts[0]} is a text file, which has no records."
        )
    if texts and source.keep:
        raise UserError(f"data.source.keep: {texts[0]} is a text file, which has no fields to filter by.")
    tables = (FileFormat.parquet, FileFormat.arrow)
    if source.kind is SourceKind.datasets and (other := [f.path for f in files if f.format not in tables]):
        raise UserError(
            f"data.source.paths: {other[0]} is not a .parquet or .arrow file.\n  Use data=jsonl for it."
        )
    size = sum(file.size for file in files)
    return Corpus(files, None, f"{len(files):,} files, {size:,} bytes: {' '.join(source.paths)}")


def source_settings(source: SourceConfig, corpus: Corpus, sequence_length: int) -> dict[str, Any]:
    """Return the settings that determine the documents, as the manifest stores them.

    For the standard library no further settings apply.

    Args:
        source: The `data.source` section.
        corpus: What it stands for.
        sequence_length: data.sequence_length, at which preferences are cut.
    """
    settings: dict[str, Any] = {
        "data.source.kind": source.kind.value,
        "data.source.validation_fraction": None
        if corpus.has_validation_files
        else source.validation_fraction,
    }
    if source.kind is not SourceKind.python_stdlib:
        settings |= {
            "corpus": corpus.fingerprint(),
            "data.source.text_field": source.text_field,
            "data.source.id_field": source.id_field,
            "data.source.max_record_bytes": source.max_record_bytes,
        }
    # Older manifests have none of these settings, so they are stored only if they are not the default.
    if source.records is not Records.text:
        del settings["data.source.text_field"]
        settings["data.source.records"] = source.records.value
        for key in CONTENT_KEYS[source.records]:
            settings[f"data.source.{key}_field"] = getattr(source, f"{key}_field")
        settings |= {f"data.source.{key}": value for key, value in changed_conversation_keys(source).items()}
    if source.records in PREFERENCES:
        settings |= {
            "data.source.prompt_field": source.prompt_field,
            "data.source.learn": source.learn.value,
            "data.source.truncate": source.truncate.value,
            "data.sequence_length": sequence_length,
        }
    if source.keep:
        settings["data.source.keep"] = [asdict(one) for one in source.keep]
    for key in ("min_characters", "max_characters"):
        if value := getattr(source, key):
            settings[f"data.source.{key}"] = value
    return settings
