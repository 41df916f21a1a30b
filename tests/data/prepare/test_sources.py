"""Corpora of every form become the same documents: JSON lines, text, compressed, tables, hub datasets."""

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from olmoe_train.config.choices import OnBadRecord, Records, SourceKind
from olmoe_train.data.manifest import sample_files
from olmoe_train.data.origins import Origins
from olmoe_train.data.prepare.batches import START, Position, chunks, numbered_lines, read_batches
from olmoe_train.data.prepare.corpus import find_files
from olmoe_train.data.prepare.limits import Limits
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.data.prepare.record_spec import RecordSpec
from olmoe_train.data.tokens import open_split
from olmoe_train.utils.errors import UserError
from tests.support.data import contents, prepare_config, read_texts

RECORDS = [
    {
        "id": f"doc-{i}",
        "text": f"Document {i}: größer\n\ttwo lines, {i * i}.\r\n" * (i % 7 + 1),
        "metadata": {"n": i},
    }
    for i in range(60)
]
TEXTS = [str(record["text"]) for record in RECORDS]


def as_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write(path: Path, raw: bytes) -> None:
    """Compressed by the suffix; as several members or frames, as parallel compressors write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = len(raw) // 2
    compressors: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    compress = compressors.get(path.suffix)
    path.write_bytes(compress(raw[:half]) + compress(raw[half:]) if compress else raw)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Lines in four files, three of them compressed, one two folders down; OLMoE-mix-0924's layout."""
    root = tmp_path / "corpus"
    names = ["a.jsonl", "b/c/part-0.json.gz", "b/part-1.jsonl.gz", "d.json.zst"]
    for number, name in enumerate(names):
        write(root / name, as_lines(RECORDS[15 * number : 15 * (number + 1)]))
    (root / "README.md").write_bytes(b"\xff no document")
    (root / "dataset_info.json").write_text("{}")
    write(root / ".cache/old.jsonl", b"not JSON")
    return root


def files(directory: Path, *patterns: Path | str, tokenizer: Path | None = None, **source: Any) -> Any:
    source = {"kind": "files", "paths": [str(pattern) for pattern in patterns], **source}
    return prepare_config(directory, tokenizer=tokenizer, **as_enums(source))


def as_enums(source: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, Any] = {"kind": SourceKind, "on_bad_record": OnBadRecord, "records": Records}
    return {key: kinds[key](value) if key in kinds else value for key, value in source.items()}


def test_folder_of_compressed_lines(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepare(files(tmp_path / "data", corpus))
    train, validation = read_texts(tmp_path / "data", "train"), read_texts(tmp_path / "data", "validation")
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in train]  # files in order of name, lines in order
    assert 3 <= len(validation) <= 25
    assert manifest.train.bytes + manifest.validation.bytes == sum(len(text.encode()) for text in TEXTS)
    assert "4 files, " in capsys.readouterr().out


def test_globs_and_names_mean_the_same_as_the_folder(corpus: Path, tmp_path: Path) -> None:
    folder = find_files([str(corpus)], [])
    globbed = find_files([f"{corpus}/**/*.jsonl", f"{corpus}/**/*.jso*.gz", f"{corpus}/d*.zst"], [])
    assert [part.path for part in globbed] == [part.path for part in folder]
    named = find_files([str(corpus / "a.jsonl"), str(corpus / "a.*"), str(corpus)], [])
    assert [Path(part.path).name for part in named] == [
        "a.jsonl",
        "part-0.json.gz",
        "part-1.jsonl.gz",
        "d.json.zst",
    ]


def test_same_bytes_from_one_process_and_from_two_anywhere(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(batch_bytes=500)
    prepare(files(tmp_path / "one", corpus), limits)
    moved = tmp_path / "elsewhere"
    corpus.rename(moved)
    os.utime(moved / "a.jsonl", (0, 0))
    monkeypatch.chdir(tmp_path)
    prepare(files(tmp_path / "two", "elsewhere", processes=2), limits)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    manifests = [json.loads(found.pop("manifest.json")) for found in (one, two)]
    for key in ("source", "source_files"):  # they say where the corpus is
        assert manifests[0].pop(key) != manifests[1].pop(key)
    assert one.pop("source_files.json") != two.pop("source_files.json")
    assert one == two
    assert manifests[0] == manifests[1]
    assert_origins(tmp_path / "two")


def assert_origins(directory: Path) -> None:
    """The file and line that are recorded of each document contain its text."""
    for name in ("train", "validation"):
        split = open_split(directory, name)
        texts = read_texts(directory, name)
        found = [Origins(split).of(number) for number in range(split.documents)]
        for origin, text in zip(found, texts, strict=True):
            assert origin.file is not None
            assert origin.line is not None
            with Path(origin.file).open("rb") as raw:
                lines = b"".join(chunks(raw, origin.file)).splitlines()
            assert json.loads(lines[origin.line - 1])["text"] == text


def test_documents_keep_their_split_when_lines_move(corpus: Path, tmp_path: Path) -> None:
    """By id; without ids, by file and line."""
    prepare(files(tmp_path / "data", corpus))
    write(tmp_path / "shuffled.jsonl", as_lines(RECORDS[::-1]))
    prepare(files(tmp_path / "again", tmp_path / "shuffled.jsonl"))
    by_id = read_texts(tmp_path / "data", "validation")
    assert sorted(read_texts(tmp_path / "again", "validation")) == sorted(by_id)
    prepare(files(tmp_path / "lines", corpus, id_field=None))
    prepare(files(tmp_path / "other", tmp_path / "shuffled.jsonl", id_field=None))
    by_line = read_texts(tmp_path / "lines", "validation")
    assert by_line != by_id
    assert sorted(read_texts(tmp_path / "other", "validation")) != sorted(by_line)


def test_validation_files_are_never_trained_on(corpus: Path, tmp_path: Path) -> None:
    cfg = files(tmp_path / "data", corpus, validation_paths=[f"{corpus}/b/*.gz"], validation_fraction=0.5)
    prepare(cfg)
    assert read_texts(tmp_path / "data", "validation") == TEXTS[30:45]
    assert read_texts(tmp_path / "data", "train") == TEXTS[:30] + TEXTS[45:]
    with pytest.raises(UserError, match=r"validation_paths=.*takes every file"):
        prepare(files(tmp_path / "all", corpus / "a.jsonl", validation_paths=[str(corpus)]))


def test_text_files_and_code_trees(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS[:20]):
        suffix = [".txt", ".txt.gz", ".txt.zst", ".py"][number % 4]
        write(tmp_path / f"tree/{number:02d}{suffix}", text.encode())
    prepare(files(tmp_path / "text", tmp_path / "tree", validation_fraction=0.0))
    assert read_texts(tmp_path / "text", "train") == [TEXTS[i] for i in range(20) if i % 4 != 3]
    prepare(files(tmp_path / "code", f"{tmp_path}/tree/**/*.py", validation_fraction=0.0))
    assert read_texts(tmp_path / "code", "train") == TEXTS[3:20:4]


def test_tables_are_read_like_lines(corpus: Path, tmp_path: Path) -> None:
    """Parquet, arrow streams (what `datasets` saves) and arrow files; by either kind, in any mixture."""
    table = pa.table({key: [record[key] for record in RECORDS] for key in ("id", "text")})
    pq.write_table(table.slice(0, 25), make(tmp_path / "tables/0.parquet"), row_group_size=7)
    with pa.ipc.new_stream(str(tmp_path / "tables/1.arrow"), table.schema) as writer:
        writer.write_table(table.slice(25, 20), max_chunksize=6)
    with pa.ipc.new_file(str(tmp_path / "tables/2.arrow"), table.schema) as writer:
        writer.write_table(table.slice(45), max_chunksize=6)
    lines = prepare(files(tmp_path / "lines", corpus))
    for kind in ("files", "datasets"):
        prepared = prepare(files(tmp_path / kind, tmp_path / "tables", kind=kind))
        for one, other in ((prepared.train, lines.train), (prepared.validation, lines.validation)):
            assert [sample_files(shard) for shard in one.shards] == [sample_files(s) for s in other.shards]
            assert replace(one, shards=()) == replace(other, shards=())
    with pytest.raises(UserError, match=r"0\.parquet: no column 'body'; it has id, text(.|\n)*text_field"):
        prepare(files(tmp_path / "no", tmp_path / "tables", text_field="body"))
    with pytest.raises(UserError, match=r"a\.jsonl is not a \.parquet or \.arrow file(.|\n)*data=jsonl"):
        prepare(files(tmp_path / "no", corpus, kind="datasets"))


def make(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path)


def test_streamed_dataset(corpus: Path, tmp_path: Path) -> None:
    """A local directory laid out like a dataset of the hub: what `datasets` streams by name, the same way."""
    for split, records in (("train", RECORDS[:50]), ("validation", RECORDS[50:])):
        columns = {"url": [r["id"] for r in records], "body": [r["text"] for r in records]}
        pq.write_table(pa.table(columns), make(tmp_path / f"hub/data/{split}-0.parquet"))
    source: dict[str, Any] = {
        "kind": "datasets",
        "name": str(tmp_path / "hub"),
        "text_field": "body",
        "id_field": "url",
    }
    prepare(files(tmp_path / "given", validation_split="validation", **source))
    assert read_texts(tmp_path / "given", "train") == TEXTS[:50]
    assert read_texts(tmp_path / "given", "validation") == TEXTS[50:]
    prepare(files(tmp_path / "hashed", **source))
    prepare(files(tmp_path / "lines", corpus))
    by_id = [text for text in read_texts(tmp_path / "lines", "validation") if text in TEXTS[:50]]
    assert read_texts(tmp_path / "hashed", "validation") == by_id
    with pytest.raises(UserError, match=r"data\.source\.split=nope: .*train"):
        prepare(files(tmp_path / "no", **source, split="nope"))
    with pytest.raises(UserError, match=r"hub: no column 'text'; it has url, body"):
        prepare(files(tmp_path / "no", **{**source, "text_field": "text"}))
    with pytest.raises(UserError, match=r"data\.source\.name=.*nowhere: "):
        prepare(files(tmp_path / "no", **{**source, "name": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize("layout", ["lines", "text", "parquet", "mixed"])
def test_reading_from_any_position_goes_on_exactly(corpus: Path, tmp_path: Path, layout: str) -> None:
    limits = Limits(batch_bytes=300, rows_per_read=4)
    if layout in ("text", "mixed"):
        for number, text in enumerate(TEXTS[:9]):
            write(corpus / f"{number}.txt", text.encode())
        write(corpus / "bb.jsonl", b"")
    if layout in ("parquet", "mixed"):
        table = pa.table({"text": TEXTS[:30]})
        pq.write_table(table, str(corpus / "c.parquet"), row_group_size=7)
    patterns = {"lines": "**/*.json*", "text": "*.txt", "parquet": "*.parquet", "mixed": ""}
    parts = find_files([f"{corpus}/{patterns[layout]}"], [])
    if layout == "lines":
        parts = [part for part in parts if part.name != "dataset_info.json"]
    spec = RecordSpec(Records.text, ("text",), "id", 10**6)
    batches = list(read_batches(parts, START, spec, limits=limits))
    assert len(batches) > 3
    assert sum(batch.bytes_read for batch in batches) == sum(part.size for part in parts)
    for number, batch in enumerate(batches):
        again = list(read_batches(parts, batch.end, spec, limits=limits))
        assert [b.work for b in again] == [b.work for b in batches[number + 1 :]]
    assert list(read_batches(parts, Position(len(parts), 0), spec, limits=limits)) == []


def test_lines_are_the_same_however_the_bytes_come() -> None:
    raw = b"\xef\xbb\xbfone\n\ntwo\r\n" + b"x" * 50 + b"\nfour\nlast"
    whole = [
        (1, b"one", 3),
        (2, b"", 0),
        (3, b"two\r", 4),
        (4, b"x" * 50, 50),
        (5, b"four", 4),
        (6, b"last", 4),
    ]
    for size in (3, 7, 100):
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        assert list(numbered_lines(iter(pieces), 100, 1000)) == whole
        assert list(numbered_lines(iter(pieces), 50, 1000)) == whole


def test_line_over_the_limit_is_cut_and_measured() -> None:
    raw = b"a" * 10 + b"\n" + b"b" * 11 + b"\nc\n" + b"d" * 30
    for size in (1, 4, 16, 100):
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        found = list(numbered_lines(iter(pieces), 10, 5))
        assert found == [(1, b"a" * 10, 10), (2, b"bbbbb", 11), (3, b"c", 1), (4, b"ddddd", 30)]


def test_pattern_without_files_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x = 1\n")
    for pattern in ("nothing/*.jsonl", "nothing.jsonl", "a**b"):
        with pytest.raises(UserError, match=r"data\.source\.paths: no file is called or matches"):
            prepare(files(tmp_path / "data", f"{tmp_path}/{pattern}"))
    with pytest.raises(UserError, match=r"holds no \.jsonl(.|\n)*give a glob: '.*/\*\*/\*\.py'"):
        prepare(files(tmp_path / "data", tmp_path))


def test_keys_that_do_not_fit_the_kind(tmp_path: Path) -> None:
    for source, message in (
        ({"kind": "files"}, r"paths=\[\]: give files"),
        (
            {"kind": "files", "paths": ["x"], "name": "c4"},
            r"name=c4: has no effect with data.source.kind=files",
        ),
        ({"kind": "datasets"}, r"give one of data\.source\.name .* and data\.source\.paths"),
        ({"kind": "datasets", "name": "c4", "paths": ["x"]}, r"give one of data\.source\.name"),
        (
            {"kind": "datasets", "name": "c4", "validation_paths": ["x"]},
            r"validation_paths=\['x'\]: has no effect",
        ),
        ({"paths": ["x"]}, r"paths=\['x'\]: has no effect with data\.source\.kind=python_stdlib"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(prepare_config(tmp_path / "data", **as_enums(source)))


def test_another_corpus_is_not_taken_for_the_prepared_one(corpus: Path, tmp_path: Path) -> None:
    prepare(files(tmp_path / "data", corpus))
    prepare(files(tmp_path / "data", f"{corpus}/", processes=2))
    write(corpus / "e.jsonl", as_lines(RECORDS[:1]))
    with pytest.raises(UserError, match=r"prepared with other settings:\n    corpus: sha256:"):
        prepare(files(tmp_path / "data", corpus))
