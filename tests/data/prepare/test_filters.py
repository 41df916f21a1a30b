"""Filters of `olmoe prepare`: by the fields of a record and the length of its text."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olmoe_train.config.choices import Records, SourceKind
from olmoe_train.config.data import FieldFilter
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.utils.errors import UserError
from tests.support.data import prepare_config, read_texts

RECORDS: list[dict[str, Any]] = [
    {"text": "one", "source": "wiki", "metadata": {"language": "en", "score": 1}},
    {"text": "two and more", "source": "wiki", "metadata": {"language": "fr", "score": 2}},
    {"text": "three", "source": "web", "metadata": {"language": "en", "score": None}},
    {"text": "four is a longer text than others", "metadata": {}},
    {"text": "", "source": "wiki", "metadata": {"language": "en"}},
    {"text": "größe", "source": None, "metadata.language": "de"},
]


def config(directory: Path, corpus: Path, *keep: FieldFilter, **source: Any) -> PrepareConfig:
    source = {"kind": SourceKind.files, "paths": [str(corpus)], "validation_fraction": 0.0, **source}
    return prepare_config(directory, keep=list(keep), **source)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ([FieldFilter("source", ["wiki"])], [0, 1]),
        ([FieldFilter("metadata.language", ["en", "de"])], [0, 2, 5]),  # a name with a dot in it, too
        ([FieldFilter("metadata.language", ["en"]), FieldFilter("source", ["wiki"])], [0]),
        ([FieldFilter("source", [None])], [3, 5]),  # null, or no such field
        ([FieldFilter("metadata.score", [1])], [0]),
        ([FieldFilter("metadata.language.code", [None])], [0, 1, 2, 3, 5]),
    ],
)
def test_by_field(tmp_path: Path, corpus: Path, keep: list[FieldFilter], expected: list[int]) -> None:
    manifest = prepare(config(tmp_path / "data", corpus, *keep))
    assert read_texts(tmp_path / "data", "train") == [RECORDS[i]["text"] for i in expected]
    assert manifest.filtered_records + manifest.skipped_empty_documents == 6 - len(expected)


def test_true_is_not_one(tmp_path: Path) -> None:
    lines = [{"text": "yes", "ok": True}, {"text": "number", "ok": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for value, text in ((True, "yes"), (1, "number")):
        prepare(config(tmp_path / text, tmp_path / "a.jsonl", FieldFilter("ok", [value])))
        assert read_texts(tmp_path / text, "train") == [text]


def test_by_length_in_characters(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare(config(tmp_path / "data", corpus, min_characters=5, max_characters=12))
    assert read_texts(tmp_path / "data", "train") == ["two and more", "three", "größe"]
    assert (manifest.filtered_records, manifest.skipped_empty_documents) == (2, 1)
    assert "filtered    2 records" in capsys.readouterr().out
    (tmp_path / "long.txt").write_text("x" * 13)
    (tmp_path / "short.txt").write_text("x" * 12)
    files = prepare(config(tmp_path / "files", Path(f"{tmp_path}/*.txt"), max_characters=12))
    assert (files.train.documents, files.filtered_records) == (1, 1)


def test_a_conversation_is_as_long_as_it_is_rendered(tmp_path: Path) -> None:
    lines = [{"prompt": "x = 1", "completion": "\n" + "y" * n} for n in (4, 5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"records": Records.prompt_completion, "max_characters": 10}
    manifest = prepare(config(tmp_path / "data", tmp_path / "a.jsonl", **source))
    assert read_texts(tmp_path / "data", "train") == ["x = 1\nyyyy"]
    assert manifest.filtered_records == 1


def test_a_record_that_is_not_wanted_is_not_a_bad_one(tmp_path: Path, corpus: Path) -> None:
    corpus.write_text(corpus.read_text() + '{"source": "other", "text": 7}\n')
    prepare(config(tmp_path / "data", corpus, FieldFilter("source", ["wiki"])))
    with pytest.raises(UserError, match=r"a\.jsonl:7: its 'text' is a JSON number"):
        prepare(config(tmp_path / "other", corpus, FieldFilter("source", ["other"])))


def test_tables(tmp_path: Path) -> None:
    rows = [{"text": r["text"], "metadata": r.get("metadata"), "source": r.get("source")} for r in RECORDS]
    pq.write_table(pa.Table.from_pylist(rows), str(tmp_path / "a.parquet"))
    keep = FieldFilter("metadata.language", ["en"])
    prepare(config(tmp_path / "data", tmp_path / "a.parquet", keep))
    assert read_texts(tmp_path / "data", "train") == ["one", "three"]
    with pytest.raises(UserError, match=r"no column 'meta'; it has text, metadata(.|\n)*source\.keep"):
        prepare(config(tmp_path / "no", tmp_path / "a.parquet", FieldFilter("meta.language", ["en"])))


def test_filters_are_among_the_settings(tmp_path: Path, corpus: Path) -> None:
    prepare(config(tmp_path / "data", corpus, max_characters=30))
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path / "data", corpus, FieldFilter("source", ["wiki"]), min_characters=2))
    for line in (
        "data.source.keep: null there, [{'field': 'source', 'values': ['wiki']}] requested",
        "data.source.min_characters: null there, 2 requested",
        "data.source.max_characters: 30 there, null requested",
    ):
        assert line in str(caught.value)


def test_filters_that_cannot_be(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match=r"data\.source\.keep: .*b\.txt is a text file, which has no fields"):
        prepare(config(tmp_path / "data", tmp_path / "b.txt", FieldFilter("source", ["wiki"])))
    with pytest.raises(UserError, match=r"with text in it that passes the filters \(6 records do not"):
        prepare(config(tmp_path / "data", corpus, FieldFilter("source", ["web"]), min_characters=99))
    with pytest.raises(UserError, match=r"min_characters=-1: must not be(.|\n)*max_characters=0: must be"):
        prepare(config(tmp_path / "data", corpus, min_characters=-1, max_characters=0))
    with pytest.raises(
        UserError, match=r"max_characters=4: must be at least 1, and at least data\.source\.min_characters"
    ):
        prepare(config(tmp_path / "data", corpus, min_characters=5, max_characters=4))
