"""Bad records: named by path and line and refused, or set aside with their reasons up to a ceiling."""

import base64
import gzip
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers

from olmoe_train.config.choices import OnBadRecord, Records, SourceKind
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.manifest import Manifest
from olmoe_train.data.prepare.batches import START, numbered_lines, read_batches
from olmoe_train.data.prepare.corpus import find_files
from olmoe_train.data.prepare.limits import Limits
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.data.prepare.record_spec import RecordSpec
from olmoe_train.data.prepare.records import BadRecord, ValidationSplit, documents
from olmoe_train.utils.errors import UserError
from tests.support.data import prepare_config, read_texts

GOOD = [f"good document number {number}, with some words" for number in range(30)]
LIMIT = 5000

BAD = {
    "malformed": (b'{"text": "cut o', "malformed JSON: Unterminated string starting at at column 10"),
    "number": (b'{"text": ' + b"9" * 4500 + b"}", "malformed JSON: Exceeds the limit"),
    "nested": (b'{"text": ' + b"[" * 4900, "malformed JSON: "),
    "encoding": (b'{"text": "caf\xe9"}', "byte 0xe9 is not UTF-8 (invalid continuation byte)"),
    "list": (b'["text"]', "a JSON list, not an object with a field 'text'"),
    "missing": (b'{"id": 4, "body": "x"}', "no field 'text' (data.source.text_field); it has 'id', 'body'"),
    "null": (b'{"text": null}', "its 'text' is a JSON null, not a string"),
    "not a string": (b'{"text": 12}', "its 'text' is a JSON number, not a string"),
    "half a pair": (b'{"text": "x\\ud83d"}', "its 'text' has half a surrogate pair, \\ud83d, at 1"),
    "long": (
        b'{"text": "' + b"y" * LIMIT + b'"}',
        "5,012 bytes, more than data.source.max_record_bytes=5000",
    ),
}


def config(directory: Path, *paths: Path, quarantine: bool = False, **source: Any) -> PrepareConfig:
    action = OnBadRecord.quarantine if quarantine else OnBadRecord.strict
    source = {"max_record_bytes": LIMIT, "max_bad_fraction": 1.0, **source}
    names = [str(path) for path in paths]
    return prepare_config(directory, kind=SourceKind.files, paths=names, on_bad_record=action, **source)


def write_lines(path: Path, *extra: bytes) -> Path:
    """The good documents with `extra` lines after the 20th; the first is line 22, for one is blank."""
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    path.write_bytes(b"\n".join([*lines[:20], b"", *extra, *lines[20:]]))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """So that encoding, not training the tokenizer, meets the records first."""
    prepare(config(tmp_path / "for_tokenizer", write_lines(tmp_path / "good.jsonl")))
    return tmp_path / "for_tokenizer/tokenizer"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("given", [True, False])
def test_strict_names_path_and_line(tmp_path: Path, tokenizer: Path, name: str, given: bool) -> None:
    line, reason = BAD[name]
    corpus = write_lines(tmp_path / "bad.jsonl", line)
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path / "data", corpus, tokenizer=tokenizer if given else None))
    assert str(caught.value).startswith(f"{corpus}:22: {reason}")
    assert "data.source.on_bad_record=quarantine" in str(caught.value)
    assert not list(tmp_path.glob("*data*"))


def test_quarantine_keeps_every_bad_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line, _ in BAD.values()]
    corpus = write_lines(tmp_path / "bad.jsonl", *lines)
    manifest = prepare(config(tmp_path / "data", corpus, quarantine=True))
    train, validation = read_texts(tmp_path / "data", "train"), read_texts(tmp_path / "data", "validation")
    assert sorted(train + validation) == sorted(GOOD)
    assert manifest.quarantined_records == len(BAD)
    printed = capsys.readouterr().out
    assert f"quarantined {len(BAD)} bad records: {tmp_path}/data/quarantine.jsonl" in printed
    records = [json.loads(line) for line in (tmp_path / "data/quarantine.jsonl").read_text().splitlines()]
    for number, (record, (line, reason)) in enumerate(zip(records, BAD.values(), strict=True)):
        assert record["where"] == f"{corpus}:{22 + number}"
        assert record["reason"].startswith(reason)
        kept = record["record"].encode() if "record" in record else base64.b64decode(record["record_base64"])
        assert kept == (line[:1000] if len(line) > LIMIT else line)


def test_quarantine_stops_at_its_ceiling(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "bad.jsonl", b"1", b"2")  # 2 of 32 records
    prepare(config(tmp_path / "allowed", corpus, quarantine=True, max_bad_fraction=2 / 32))
    with pytest.raises(UserError) as caught:
        prepare(config(tmp_path / "data", corpus, quarantine=True, max_bad_fraction=1.9 / 32))
    assert "max_bad_fraction=0.059375: 2 of 32 records are bad" in str(caught.value)
    assert f"{corpus}:23: a JSON number, not an object" in str(caught.value)
    kept = tmp_path / ".data.partial/quarantine.jsonl"
    assert str(kept) in str(caught.value)
    assert len(kept.read_text().splitlines()) == 2
    prepare(config(tmp_path / "data", corpus, quarantine=True))  # raised, and begun anew
    assert (tmp_path / "data/quarantine.jsonl").read_bytes() == (
        tmp_path / "allowed/quarantine.jsonl"
    ).read_bytes()


def test_ceiling_is_met_early_in_a_long_corpus(tmp_path: Path) -> None:
    """11 bad of the first 1,000 are too many for 1% whatever follows; here a damaged file would follow."""
    limits = Limits(batch_bytes=500, batches_per_process=1)
    lines = write_lines(tmp_path / "good.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(lines + b"\n" + b"0\n" * 11 + lines * 20)
    damaged = gzip.compress(lines)[:-20]
    (tmp_path / "b.jsonl.gz").write_bytes(damaged)
    prepare(config(tmp_path / "for_tokenizer", tmp_path / "good.jsonl"))
    given = tmp_path / "for_tokenizer/tokenizer"
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz")
    cfg = config(tmp_path / "data", *paths, quarantine=True, max_bad_fraction=0.01, tokenizer=given)
    with pytest.raises(UserError, match=r"max_bad_fraction=0\.01: 11 of [\d,]+ records are bad"):
        prepare(cfg, limits)


def test_empty_documents_and_files_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_lines(tmp_path / "a.jsonl", b'{"text": ""}', b'{"text": " \\n\\t"}', b"   ", b"\r")
    for name in ("b.jsonl", "c.txt", "d.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    manifest = prepare(config(tmp_path / "data", tmp_path))
    assert corpus.exists()
    assert manifest.skipped_empty_documents == 5
    assert manifest.train.documents + manifest.validation.documents == len(GOOD)
    assert "skipped     5 empty documents" in capsys.readouterr().out


def test_corpus_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": ""}\n')
    with pytest.raises(UserError, match=r"1 files, 14 bytes: .* has no document with text in it"):
        prepare(config(tmp_path / "data", tmp_path / "a.jsonl"))


def test_bad_text_files_and_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nna\xefve\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"z" * (LIMIT + 1)))
    texts = [*GOOD, None, "w" * (LIMIT + 1)]
    pq.write_table(pa.table({"text": texts}), str(tmp_path / "c.parquet"))
    reasons = {
        f"{tmp_path}/a.txt:2": "byte 0xef is not UTF-8",
        f"{tmp_path}/b.txt.gz:1": "more than data.source.max_record_bytes=5000 bytes",
        f"{tmp_path}/c.parquet:31": "its 'text' is a JSON null, not a string",
        f"{tmp_path}/c.parquet:32": "5,001 bytes, more than",
    }
    manifest = prepare(config(tmp_path / "data", tmp_path, quarantine=True))
    assert manifest.train.documents + manifest.validation.documents == len(GOOD)
    records = [json.loads(line) for line in (tmp_path / "data/quarantine.jsonl").read_text().splitlines()]
    for record, (where, reason) in zip(records, reasons.items(), strict=True):
        assert record["where"] == where
        assert record["reason"].startswith(reason)
    with pytest.raises(UserError, match=r"a\.txt:2: byte 0xef"):
        prepare(config(tmp_path / "strict", tmp_path))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "txt.gz", "txt.zst", "parquet"])
@pytest.mark.parametrize("quarantine", [True, False])
def test_damaged_files_stop_in_either_mode(
    tmp_path: Path, tokenizer: Path, suffix: str, quarantine: bool
) -> None:
    """Cut short in the middle: what is lost cannot be set aside."""
    raw = (tmp_path / "good.jsonl").read_bytes()
    path = tmp_path / f"bad.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": GOOD}), str(path))
        path.write_bytes(path.read_bytes()[:-10])
    else:
        whole = gzip.compress(raw) if suffix.endswith("gz") else zstandard.compress(raw)
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"bad\.{suffix}:\d+: the file is damaged from here on"):
        prepare(config(tmp_path / "data", path, tokenizer=tokenizer, quarantine=quarantine))


def peak_bytes(work: Callable[[], Any]) -> tuple[Any, int]:
    """(result, most bytes that Python objects held while it was made)"""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_whatever_a_line_holds() -> None:
    """100 MB in one line: the reader holds no more than the limit and a chunk."""
    chunk = b"x" * (1 << 20)

    def stream() -> Iterator[bytes]:
        yield b'{"text": "'
        for _ in range(100):
            yield chunk
        yield b'"}\nnext'

    found, peak = peak_bytes(lambda: list(numbered_lines(stream(), limit=4 << 20, excerpt_bytes=1000)))
    assert [(number, len(line), size) for number, line, size in found] == [
        (1, 1000, 100 * (1 << 20) + 12),
        (2, 4, 4),
    ]
    assert peak < 16 << 20


@pytest.mark.parametrize("suffix", ["jsonl.zst", "jsonl.gz", "txt.zst", "txt.gz"])
def test_memory_is_bounded_however_well_it_is_packed(tmp_path: Path, suffix: str) -> None:
    """100 MB of one character are a few KB compressed, which must not be unpacked at once."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((zstandard if suffix.endswith("zst") else gzip).compress(b"x" * 100_000_000))
    spec = RecordSpec(Records.text, ("text",), "id", max_record_bytes=1 << 20)

    def read() -> list[Any]:
        batches = read_batches(find_files([str(path)], []), START, spec)
        return [
            record for batch in batches for record in documents(batch.work, spec, ValidationSplit(0.0, 0))
        ]

    [bad], peak = peak_bytes(read)
    assert isinstance(bad, BadRecord)
    assert (bad.where, len(bad.record)) == (f"{path}:1", 1000)
    assert peak < 24 << 20


def test_word_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "good": 1, "words": 2}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    texts = ["good words", "good", "bad words", "words words"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    paths: dict[str, Any] = {"tokenizer": tmp_path / "tokenizer.json", "validation_fraction": 0.0}
    with pytest.raises(UserError, match=r"a\.jsonl:3: the tokenizer cannot encode it: .*UNK"):
        prepare(config(tmp_path / "data", tmp_path / "a.jsonl", **paths))
    manifest: Manifest = prepare(config(tmp_path / "data", tmp_path / "a.jsonl", quarantine=True, **paths))
    assert (manifest.train.documents, manifest.quarantined_records) == (3, 1)


@pytest.mark.slow
def test_command_exits_with_2(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "bad.jsonl", b"{")
    command = [sys.executable, "-m", "olmoe_train", "prepare", "data=jsonl", "tokenizer.vocab_size=300"]
    overrides = [f"data.source.paths=[{corpus}]", f"data.dir={tmp_path}/data"]
    result = subprocess.run([*command, *overrides], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"error: {corpus}:22: malformed JSON" in result.stderr
    assert "Traceback" not in result.stderr
    quarantine = ["data.source.on_bad_record=quarantine", "data.source.max_bad_fraction=0.1"]
    result = subprocess.run([*command, *overrides, *quarantine], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "quarantined 1 bad records" in result.stdout
