"""The corpus that data.source describes, found and identified, before any of it is read."""

import platform
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from olmoe_train.config.choices import Records, SourceKind
from olmoe_train.config.data import SourceConfig
from olmoe_train.data.prepare.corpus import Layout, Part, digest, find_parts, python_stdlib_parts
from olmoe_train.data.prepare.hub import HubDataset, hub_parts, open_hub_dataset
from olmoe_train.data.prepare.record_spec import CONTENT_KEYS
from olmoe_train.utils.errors import UserError


@dataclass(frozen=True)
class Corpus:
    parts: list[Part]
    hub: HubDataset | None
    """What streams the parts of Layout.hub."""
    description: str
    """For people."""

    @property
    def own_validation(self) -> bool:
        """Whether validation is parts of its own, rather than documents chosen by a hash."""
        return any(part.validation for part in self.parts)

    @property
    def size(self) -> int | None:
        """Bytes on disk; None where the parts do not say."""
        return sum(part.size for part in self.parts) or None

    def fingerprint(self) -> str:
        """The same for a copy of the corpus elsewhere, another when files come, go or grow."""
        rows = [[part.name, part.size, part.validation] for part in self.parts]
        return digest([self.hub.fingerprint if self.hub else None, *rows])

    def fingerprint_in_place(self) -> str:
        """Of paths and times of change too: what a half-finished preparation may go on from."""
        return digest([self.fingerprint(), *([part.path, part.modified_ns] for part in self.parts)])


def source_errors(source: SourceConfig) -> list[str]:
    """What says where the corpus is, and does not fit its kind."""
    kind = f"data.source.kind={source.kind.value}"
    if source.kind is SourceKind.files and not source.paths:
        return ["data.source.paths=[]: give files, globs or folders: 'data.source.paths=[corpus/*.jsonl]'"]
    if source.kind is SourceKind.datasets and bool(source.paths) == (source.name is not None):
        return [f"{kind}: give one of data.source.name (a dataset) and data.source.paths (parquet and arrow)"]
    unread = {
        "name": source.kind is not SourceKind.datasets,
        "paths": source.kind is SourceKind.python_stdlib,
        "validation_paths": not source.paths,
        "keep": source.kind is SourceKind.python_stdlib,
    }
    errors = [
        f"data.source.{key}={value}: has no effect with {kind}; see data=jsonl and data=hf"
        for key, nothing_reads_it in unread.items()
        if nothing_reads_it and (value := getattr(source, key))
    ]
    if source.records is not Records.text and source.kind is SourceKind.python_stdlib:
        errors.append(
            f"data.source.records={source.records.value}: {kind} has text files only; see data=chat"
        )
    return errors


def open_corpus(source: SourceConfig) -> Corpus:
    if source.kind is SourceKind.python_stdlib:
        version = f"{platform.python_implementation()} {platform.python_version()}"
        parts = python_stdlib_parts(Path(sysconfig.get_paths()["stdlib"]))
        return Corpus(parts, None, f"the standard library of {version}")
    if source.name is not None:
        hub = open_hub_dataset(source.name, source.subset, source.revision)
        names = ", ".join(f"{k}={v}" for k in ("subset", "revision", "split") if (v := getattr(source, k)))
        return Corpus(
            hub_parts(hub, source.split, source.validation_split), hub, f"dataset {source.name} ({names})"
        )
    parts = find_parts(source.paths, source.validation_paths)
    texts = [part.path for part in parts if part.layout is Layout.text]
    if texts and source.records is not Records.text:
        raise UserError(f"data.source.records={source.records.value}: {texts[0]} is text, it has no records.")
    if texts and source.keep:
        raise UserError(f"data.source.keep: {texts[0]} is text, it has no fields to keep it by.")
    tables = (Layout.parquet, Layout.arrow)
    if source.kind is SourceKind.datasets and (other := [p.path for p in parts if p.layout not in tables]):
        raise UserError(
            f"data.source.paths: {other[0]} is no .parquet or .arrow file.\n  Use data=jsonl for it."
        )
    size = sum(part.size for part in parts)
    return Corpus(parts, None, f"{len(parts):,} files, {size:,} bytes: {' '.join(source.paths)}")


def source_settings(source: SourceConfig, corpus: Corpus) -> dict[str, Any]:
    """What decides the documents, as the manifest keeps it. The standard library is what it is."""
    settings: dict[str, Any] = {
        "data.source.kind": source.kind.value,
        "data.source.validation_fraction": None if corpus.own_validation else source.validation_fraction,
    }
    if source.kind is not SourceKind.python_stdlib:
        settings |= {
            "corpus": corpus.fingerprint(),
            "data.source.text_field": source.text_field,
            "data.source.id_field": source.id_field,
            "data.source.max_record_bytes": source.max_record_bytes,
        }
    # Manifests once had none of these: they are there where they are not the default.
    if source.records is not Records.text:
        del settings["data.source.text_field"]
        settings["data.source.records"] = source.records.value
        for key in CONTENT_KEYS[source.records]:
            settings[f"data.source.{key}_field"] = getattr(source, f"{key}_field")
    if source.keep:
        settings["data.source.keep"] = [asdict(one) for one in source.keep]
    for key in ("min_characters", "max_characters"):
        if value := getattr(source, key):
            settings[f"data.source.{key}"] = value
    return settings
