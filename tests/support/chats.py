"""Write conversations to files, prepare them, and read back what is learnt of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from olmoe_train.config.choices import Records, SourceKind
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.manifest import read_manifest
from tests.support.chat_templates import turn
from tests.support.data import prepare_config, read_documents

QUESTION, ANSWER = turn("user", "Hello there"), turn("assistant", "It is.")
TALK = [QUESTION, ANSWER, turn("user", "what?"), turn("assistant", "Yes")]
THOUGHTS = [
    QUESTION,
    turn("assistant", "<think>\nHm.\n</think>\n\nIt is."),
    turn("user", "what?"),
    turn("assistant", "<think>\nWell.\n</think>\n\nYes"),
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


CALLS = [
    turn("user", "How warm is it there?"),
    turn("assistant", None, tool_calls=[call(at="Bern"), call(at="Zug")]),
    turn("tool", "8"),
    turn("tool", "7"),
    turn("assistant", "8 and 7."),
]


def chat_config(
    directory: Path,
    corpus: Path,
    tokenizer: Path | None,
    template: Path | None = None,
    template_kwargs: dict[str, Any] | None = None,
    **source: Any,
) -> PrepareConfig:
    """Return a configuration for conversations, with no validation split."""
    source = {"records": Records.messages, "validation_fraction": 0.0, **source}
    cfg = prepare_config(directory, tokenizer=tokenizer, kind=SourceKind.files, paths=[str(corpus)], **source)
    template_date = None if template is None else "2024-07-04"
    given = dataclasses.replace(
        cfg.tokenizer,
        chat_template=None if template is None else str(template),
        template_date=template_date,
        chat_template_kwargs=template_kwargs or {},
    )
    return dataclasses.replace(cfg, tokenizer=given)


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats(path: Path, *conversations: list[dict[str, Any]]) -> Path:
    return write_lines(path, *({"id": i, "messages": one} for i, one in enumerate(conversations)))


def learnt(directory: Path, split: str = "train") -> list[list[str]]:
    """Of each document, the texts of its runs of target tokens."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer/tokenizer.json"))
    mask = np.concatenate(
        [
            np.fromfile(directory / shard.mask_path, np.uint8)
            for shard in getattr(read_manifest(directory), split).shards
        ]
    )
    found, start = [], 0
    for document in read_documents(directory, split):
        of_document = mask[start : start + len(document)].tolist()
        start += len(document)
        runs: list[list[int]] = []
        for previous, is_target, token in zip([0, *of_document], of_document, document, strict=False):
            if is_target:
                runs = runs if previous else [*runs, []]
                runs[-1].append(token)
        found.append([tokenizer.decode(run, skip_special_tokens=False) for run in runs])
    assert start == len(mask)
    return found
