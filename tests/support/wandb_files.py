"""Read what an offline run of wandb wrote: RUN.wandb, the log format of LevelDB with a header of 7 bytes."""

import importlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

pb: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")  # its types are not annotated
BLOCK, HEADER = 32768, struct.Struct("<IHB")
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """The records of one file."""

    run: Any = None
    """The record of the run: project, display_name, run_group, tags, ..."""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    """By name: step_metric, summary."""
    alerts: list[tuple[str, str]] = field(default_factory=list)
    """(title, text)"""
    files: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)


def messages(path: Path) -> Iterator[bytes]:
    raw, at, parts = path.read_bytes(), 7, []
    assert raw[:4] == b":W&B"
    while at + HEADER.size <= len(raw):
        if (left := BLOCK - at % BLOCK) < HEADER.size:
            at += left
            continue
        _, size, kind = HEADER.unpack_from(raw, at)
        at += HEADER.size
        parts.append(raw[at : at + size])
        at += size
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def read_offline_run(path: Path) -> OfflineRun:
    """path: RUN.wandb."""
    found = OfflineRun()
    for message in messages(path):
        record = pb.Record()
        record.ParseFromString(message)
        kind = record.WhichOneof("record_type")
        found.kinds.add(kind or "")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found.history.append(
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "alert":
            found.alerts.append((record.alert.title, record.alert.text))
        elif kind == "files":
            found.files |= {file.path for file in record.files.files}
    return found
