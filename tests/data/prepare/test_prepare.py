"""From files to prepared tokens, on a small tree that stands in for the standard library."""

import dataclasses
import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from olmoe_train.config.data import DataConfig, SourceConfig, TokenizerConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.manifest import Split
from olmoe_train.data.prepare.corpus import python_stdlib_files, split_hash
from olmoe_train.data.prepare.limits import Limits
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.data.prepare.records import ValidationSplit
from olmoe_train.data.prepare.shards import clear, resumable_directory
from olmoe_train.data.prepare.summary import unigram_entropy
from olmoe_train.data.tokens import open_split
from olmoe_train.utils.errors import UserError
from tests.support.data import contents, prepare_config, read_documents

FILES = 40


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 modules, an empty one, and files that are none of the standard library's own source."""
    root = tmp_path / "lib"
    for number in range(FILES):
        path = root / ("package" if number % 2 else "") / f"module_{number:02d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"def function_{number}_{i}(x):\n\treturn x * {i * number}  # größer\r\n"
            for i in range(5 + number)
        ]
        path.write_bytes("".join(lines).encode())
    (root / "empty.py").write_bytes(b"\n")
    for other in (
        "test/t.py",
        "site-packages/s.py",
        "package/tests/t.py",
        "__pycache__/c.py",
        "config-3/c.py",
    ):
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_bytes(b"\xff not even text")
    (root / "_sysconfigdata_linux.py").write_bytes(b"\xff")
    (root / "notes.txt").write_bytes(b"\xff")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_documents_are_the_files_exactly(
    stdlib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    manifest = prepare(prepare_config(out))
    tokenizer = Tokenizer.from_file(str(out / "tokenizer/tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in (0, 1)] == ["<|endoftext|>", "<|padding|>"]
    texts = [path.read_bytes().decode() for path in sorted(stdlib.rglob("module_*.py"))]
    found = {name: list(read_documents(out, name)) for name in ("train", "validation")}
    decoded = {
        name: [tokenizer.decode(d[:-1], skip_special_tokens=False) for d in found[name]] for name in found
    }
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(texts)
    assert decoded["train"] == [text for text in texts if text in decoded["train"]]  # in order
    assert 0 < len(decoded["validation"]) < 20
    for name in found:
        assert all(document[-1] == 0 and document.count(0) == 1 for document in found[name])
        split: Split = getattr(manifest, name)
        assert split.documents == len(found[name])
        assert split.tokens == sum(len(document) for document in found[name])
        assert split.bytes == sum(len(text.encode()) for text in decoded[name])
    assert manifest.skipped_empty_documents == 1
    total_bytes = manifest.train.bytes + manifest.validation.bytes
    assert manifest.bytes_per_token == total_bytes / (manifest.train.tokens + manifest.validation.tokens)
    assert manifest.vocab_size == tokenizer.get_vocab_size() <= 400
    printed = capsys.readouterr().out
    assert f"prepared {out}" in printed
    assert f"{manifest.train.tokens:,} tokens" in printed
    assert f"{manifest.unigram_entropy:.3f} nats" in printed


def test_manifest_entropy_is_that_of_the_tokens(stdlib: Path, tmp_path: Path) -> None:
    manifest = prepare(prepare_config(tmp_path / "data"))
    train = [token for document in read_documents(tmp_path / "data", "train") for token in document]
    validation = [token for document in read_documents(tmp_path / "data", "validation") for token in document]
    denominator = len(train) + manifest.vocab_size
    nats = [-math.log((train.count(token) + 1) / denominator) for token in validation]
    assert manifest.unigram_entropy == pytest.approx(sum(nats) / len(nats), rel=1e-12)


def test_unigram_entropy_by_hand() -> None:
    # Smoothed training frequencies 4/8, 2/8, 1/8, 1/8; validation tokens 0, 0, 1, 3 cost 1, 1, 2 and 3 bits.
    entropy = unigram_entropy(np.array([3, 1, 0, 0]), np.array([2, 1, 0, 1]))
    assert entropy == pytest.approx(7 / 4 * math.log(2))
    assert unigram_entropy(np.array([3, 1]), np.array([0, 0])) is None


def test_same_bytes_from_one_process_and_from_three(stdlib: Path, tmp_path: Path) -> None:
    many_batches = Limits(batch_bytes=2000)
    prepare(prepare_config(tmp_path / "one", processes=1), many_batches)
    prepare(prepare_config(tmp_path / "three", processes=3), many_batches)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


@pytest.mark.slow
def test_tokenizer_does_not_depend_on_threads_or_the_process() -> None:
    program = (
        "from olmoe_train.data.tokenizer import train_tokenizer\n"
        "texts = [' '.join(str(i * j % 97) for j in range(200)) for i in range(300)]\n"
        "print(train_tokenizer(iter(texts), 600).sha256)"
    )
    root = Path(__file__).resolve().parents[3]
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "4")
    }
    assert len(hashes) == 1


def test_transformers_opens_the_tokenizer(stdlib: Path, tmp_path: Path) -> None:
    prepare(prepare_config(tmp_path / "data"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "data/tokenizer")
    ours = Tokenizer.from_file(str(tmp_path / "data/tokenizer/tokenizer.json"))
    text = "def function_1(x):\n\treturn größer  # <|padding|> 漢\r\n"
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token) == (0, 1, None)
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert len(theirs) == ours.get_vocab_size()


def test_shards_are_bounded_and_do_not_change_the_tokens(stdlib: Path, tmp_path: Path) -> None:
    whole = prepare(prepare_config(tmp_path / "whole"))
    parts = prepare(prepare_config(tmp_path / "parts", shard_tokens=2000))
    assert len(parts.train.shards) > 3
    assert all(shard.tokens <= 2000 for shard in parts.train.shards)
    for name in ("train", "validation"):
        assert list(read_documents(tmp_path / "parts", name)) == list(
            read_documents(tmp_path / "whole", name)
        )
    size = whole.train.tokens
    one, many = open_split(tmp_path / "whole", "train"), open_split(tmp_path / "parts", "train")
    assert np.array_equal(one.read(0, size), many.read(0, size))


def test_second_run_verifies_and_does_nothing(
    stdlib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data"
    first = prepare(prepare_config(out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert prepare(prepare_config(out, processes=2)) == first  # not a setting that decides the bytes
    assert f"already prepared, nothing to do: {out} (7 files verified)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    shard = out / "train/shard-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(UserError, match=r"shard-00000\.npy: its contents changed"):
        prepare(prepare_config(out))


def test_other_settings_are_refused_by_name(stdlib: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    prepare(prepare_config(out))
    with pytest.raises(UserError) as caught:
        prepare(prepare_config(out, seed=3, tokenizer=out / "tokenizer", shard_tokens=5000))
    message = str(caught.value)
    assert f"data.dir={out} was prepared with other settings" in message
    assert "seed: 0 there, 3 requested" in message
    assert "data.source.shard_tokens: 100000000 there, 5000 requested" in message
    assert "tokenizer.path: null there, sha256:" in message
    assert "tokenizer.vocab_size: 400 there, null requested" in message
    assert "validation_fraction" not in message
    assert f"Choose another data.dir, or delete {out}" in message


@pytest.mark.parametrize("given_tokenizer", [False, True])
def test_bad_bytes_are_reported_by_line_and_leave_nothing(
    stdlib: Path, tmp_path: Path, given_tokenizer: bool
) -> None:
    """Met while training the tokenizer here; with a tokenizer given, while encoding in a worker."""
    prepare(prepare_config(tmp_path / "good"))
    tokenizer = tmp_path / "good/tokenizer" if given_tokenizer else None
    (stdlib / "bad.py").write_bytes(b"fine = 1\n\nname = 'caf\xe9'\n")
    cfg = prepare_config(tmp_path / "data", tokenizer=tokenizer, validation_fraction=0.0)
    with pytest.raises(UserError, match=r"bad\.py:3: byte 0xe9 is not UTF-8 \(invalid continuation byte\)"):
        prepare(cfg)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "lib"]


def test_bad_settings_are_reported_together(tmp_path: Path) -> None:
    cfg = PrepareConfig(
        data=DataConfig(
            dir=str(tmp_path / "data"),
            source=SourceConfig(validation_fraction=1.0, shard_tokens=0, processes=-1),
        ),
        tokenizer=TokenizerConfig(vocab_size=257),
    )
    with pytest.raises(UserError) as caught:
        prepare(cfg)
    for part in (
        "validation_fraction=1.0",
        "shard_tokens=0",
        "processes=-1",
        "vocab_size=257: must be at least 258",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "data").exists()


def hf_directory(source: Path, target: Path) -> Path:
    """A tokenizer as others write it: truncating and padding, with special tokens as objects."""
    target.mkdir()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "pad_token": None})
    )
    (target / "chat_template.jinja").write_text("{{ messages }}")
    return target


def test_given_tokenizer_encodes_all_of_a_document(stdlib: Path, tmp_path: Path) -> None:
    trained = prepare(prepare_config(tmp_path / "trained"))
    (stdlib / "module_00.py").write_bytes(b"end = '</s>' + '<|endoftext|>'\n" * 50)
    given = hf_directory(tmp_path / "trained/tokenizer", tmp_path / "hf")
    manifest = prepare(prepare_config(tmp_path / "data", tokenizer=given, validation_fraction=0.0))
    assert manifest.eos_token_id == trained.vocab_size == manifest.vocab_size - 1
    assert manifest.validation == Split(0, 0, 0, ())
    assert manifest.unigram_entropy is None
    assert contents(tmp_path / "data/tokenizer") == contents(given)
    tokenizer = Tokenizer.from_file(str(given / "tokenizer.json"))
    found = list(read_documents(tmp_path / "data", "train"))
    decoded = [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in found]
    assert decoded == [path.read_bytes().decode() for path in sorted(stdlib.rglob("module_*.py"))]
    # Text that spells a special token is not that token.
    assert all(document.count(manifest.eos_token_id) == 1 and 0 not in document for document in found)


def test_lone_tokenizer_json(stdlib: Path, tmp_path: Path) -> None:
    trained = prepare(prepare_config(tmp_path / "trained"))
    lone = prepare(prepare_config(tmp_path / "lone", tokenizer=tmp_path / "trained/tokenizer/tokenizer.json"))
    assert (lone.eos_token_id, lone.pad_token_id, lone.train) == (0, 1, trained.train)


def test_tokenizer_without_an_end_of_text_token(stdlib: Path, tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.path=.*: no token to end documents with"):
        prepare(prepare_config(tmp_path / "data", tokenizer=tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.path=.*: not a readable tokenizer"):
        prepare(prepare_config(tmp_path / "data", tokenizer=tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.path=.*nowhere: no tokenizer\.json found"):
        prepare(prepare_config(tmp_path / "data", tokenizer=tmp_path / "nowhere"))


def test_tokenizer_keys_without_effect(stdlib: Path, tmp_path: Path) -> None:
    prepare(prepare_config(tmp_path / "trained"))
    cfg = prepare_config(tmp_path / "data", tokenizer=tmp_path / "trained/tokenizer")
    tokenizer = dataclasses.replace(cfg.tokenizer, revision="main")
    with pytest.raises(UserError, match=r"tokenizer\.revision=main: has no effect, .* is not on the hub"):
        prepare(dataclasses.replace(cfg, tokenizer=tokenizer))
    tokenizer = TokenizerConfig(revision="main", template_date="2024-07-04")
    with pytest.raises(UserError, match=r"template_date: has no effect(.|\n)*revision: has no effect"):
        prepare(dataclasses.replace(cfg, tokenizer=tokenizer))


def test_directory_with_something_else_in_it_is_left_alone(stdlib: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"data\.dir=.*mine: exists and is not prepared data"):
        prepare(prepare_config(out))
    assert (out / "thesis.txt").read_text() == "years of work"


def test_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "volume")
    with pytest.raises(UserError, match=r"data\.dir=.*volume: is a mount point.* choose .*volume/data"):
        prepare(prepare_config(tmp_path / "volume"))


def test_new_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data"
    with pytest.raises(TypeError), resumable_directory(out) as directory:
        (directory / "half").write_bytes("text")  # type: ignore[arg-type]
    assert list((tmp_path / "deep").iterdir()) == []
    # What a killed run leaves is handed over; an empty directory may be given.
    left = tmp_path / "deep" / ".data.partial"
    (left / "train").mkdir(parents=True)
    (left / "train" / "old").write_text("x")
    out.mkdir()
    with resumable_directory(out) as directory:
        assert (directory / "train" / "old").is_file()
        clear(directory)
        (directory / "whole").write_text("x")
        with (
            pytest.raises(UserError, match="another `olmoe prepare` is writing it"),
            resumable_directory(out),
        ):
            pass
        assert list(out.iterdir()) == []
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]


def test_documents_are_held_out_by_identity_and_seed_alone() -> None:
    names = [f"f{number}.py" for number in range(2000)]

    def chosen(fraction: float, seed: int) -> list[str]:
        return [name for name in names if ValidationSplit(fraction, seed).selects(split_hash(name, seed))]

    held = chosen(0.05, seed=0)
    assert 100 - 5 * 10 < len(held) < 100 + 5 * 10  # standard deviation of 2000 draws at 0.05
    assert held != chosen(0.05, seed=1)
    assert not chosen(0.0, seed=0)
    # Frozen: a corpus prepared again is split as it was.
    assert held[:3] == ["f16.py", "f37.py", "f44.py"]


def test_the_real_standard_library() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = python_stdlib_files(root)
    names = [part.name for part in parts]
    assert names == sorted(names)
    assert {"ast.py", "asyncio/events.py"} <= set(names)
    directories = {part for name in names for part in name.split("/")[:-1]}
    assert not directories & {"test", "tests", "site-packages", "__pycache__"}
    assert sum(part.size for part in parts) > 8_000_000
