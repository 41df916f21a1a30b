"""`olmoe prepare` killed with kill -9, and run again: what was finished is kept, the bytes are the same."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olmoe_train.config.choices import OnBadRecord, Records, SourceKind
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.prepare.limits import Limits
from olmoe_train.data.prepare.pipeline import prepare
from olmoe_train.data.prepare.progress import OutputWriter
from olmoe_train.utils.errors import UserError
from tests.support.data import contents, prepare_config

DEADLINE = 120.0  # seconds
LIMITS = Limits(batch_bytes=4000)  # many batches


def write_corpus(root: Path, records: int) -> Path:
    """Four files, each with an empty document and a bad record; a text is also a prompt and a completion."""
    root.mkdir()
    for number in range(4):
        lines = [record(number, i) for i in range(records)]
        lines[7:7] = [json.dumps({"text": "", "prompt": "", "completion": ""}), "not JSON"]
        (root / f"{number}.jsonl").write_text("\n".join(lines))
    return root


def record(number: int, i: int) -> str:
    prompt = f"Record {i} of file {number}:"
    completion = " " + " ".join(str(i * k % 9973) for k in range(40))
    return json.dumps({"text": prompt + completion, "prompt": prompt, "completion": completion})


def config(directory: Path, corpus: Path, **source: Any) -> PrepareConfig:
    source = {"shard_tokens": 20_000, "max_bad_fraction": 0.1, **source}
    return prepare_config(
        directory,
        kind=SourceKind.files,
        paths=[str(corpus)],
        on_bad_record=OnBadRecord.quarantine,
        **source,
    )


def test_kill_9(tmp_path: Path) -> None:
    """With loss masks: whatever the records hold, it is written by the same code."""
    corpus = write_corpus(tmp_path / "corpus", 4000)  # 3 MB: a dozen batches
    command = [
        *(sys.executable, "-m", "olmoe_train", "prepare", "data=jsonl", f"data.source.paths=[{corpus}]"),
        *(
            "tokenizer.vocab_size=400",
            "data.source.validation_fraction=0.2",
            "data.source.shard_tokens=20000",
        ),
        *("data.source.on_bad_record=quarantine", "data.source.max_bad_fraction=0.1"),
        *("data.source.processes=2", "data.source.records=prompt_completion"),
    ]
    progress = tmp_path / ".data.partial/progress.json"
    process = subprocess.Popen([*command, f"data.dir={tmp_path}/data"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + DEADLINE
    while not (progress.exists() and json.loads(progress.read_text())["train"]):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "data").exists()
    closed = json.loads(progress.read_text())["train"]["closed"]
    assert len(closed) >= 1
    before = {shard["path"]: (progress.parent / shard["path"]).stat() for shard in closed}

    again = subprocess.run(
        [*command, f"data.dir={tmp_path}/data"], capture_output=True, text=True, check=True
    )
    assert "continuing after " in again.stdout
    for path, old in before.items():
        new = (tmp_path / "data" / path).stat()
        assert (new.st_ino, new.st_mtime_ns) == (old.st_ino, old.st_mtime_ns), f"{path} was written again"
    prepare(config(tmp_path / "whole", corpus, records=Records.prompt_completion))
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert "train/shard-00001.mask.u8" in contents(tmp_path / "whole")


class Killed(BaseException):
    """Ends `prepare` where a test wants it; nothing catches it, as nothing catches a kill."""


def interrupt(
    monkeypatch: pytest.MonkeyPatch, cfg: PrepareConfig, batches: int, save_every: float = 0.0
) -> Path:
    """Runs `cfg` until `batches` are written and saved, and returns what it leaves behind."""
    written = 0
    add = OutputWriter.add

    def add_and_count(self: OutputWriter, *arguments: Any) -> None:
        nonlocal written
        add(self, *arguments)
        written += 1
        if written == batches:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(OutputWriter, "add", add_and_count)
        with pytest.raises(Killed):
            prepare(cfg, replace(LIMITS, save_seconds=save_every))
    final = Path(cfg.data.dir)
    return final.with_name(f".{final.name}.partial")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", 60)


@pytest.mark.parametrize(
    ("batches", "records"),
    [
        (1, Records.text),
        (2, Records.prompt_completion),
        (3, Records.text),
        (7, Records.prompt_completion),
        (11, Records.prompt_completion),
    ],
)
@pytest.mark.parametrize("shard_tokens", [1500, 10**6])
def test_bytes_are_those_of_an_uninterrupted_run(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches: int,
    shard_tokens: int,
    records: Records,
) -> None:
    prepare(config(tmp_path / "whole", corpus, shard_tokens=shard_tokens, records=records), LIMITS)
    cfg = config(tmp_path / "data", corpus, shard_tokens=shard_tokens, records=records)
    partial = interrupt(monkeypatch, cfg, batches)
    # What was written after the last save is of unknown length: here, rubbish.
    open_shard = json.loads((partial / "progress.json").read_text())["train"]["open"]
    masks = [open_shard["mask_path"]] if records is not Records.text else []
    for name in (open_shard["path"], open_shard["ends_path"], "quarantine.jsonl", *masks):
        with (partial / name).open("ab") as file:
            file.write(b"half a write")
    prepare(cfg, LIMITS)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert not partial.exists()


def test_documents_since_the_last_save_are_encoded_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was saved after the tokenizer, which is kept and not trained again."""
    prepare(config(tmp_path / "whole", corpus, shard_tokens=10**6), LIMITS)
    cfg = config(tmp_path / "data", corpus, shard_tokens=10**6)
    partial = interrupt(monkeypatch, cfg, 5, save_every=1e9)
    assert (partial / "train/shard-00000.npy").exists()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("olmoe_train.data.prepare.pipeline.train_tokenizer", None)
        prepare(cfg, LIMITS)
    assert "continuing" not in capsys.readouterr().out
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def change_shard(partial: Path, corpus: Path) -> None:
    path = partial / "train/shard-00000.npy"
    path.write_bytes(b"\7" + path.read_bytes()[1:])


def cut_open_shard(partial: Path, corpus: Path) -> None:
    path = partial / json.loads((partial / "progress.json").read_text())["train"]["open"]["path"]
    path.write_bytes(path.read_bytes()[:-2])


def delete_index(partial: Path, corpus: Path) -> None:
    (partial / "train/shard-00000.ends.u64").unlink()


def change_mask(partial: Path, corpus: Path) -> None:
    path = partial / "train/shard-00000.mask.u8"
    path.write_bytes(b"\1" + path.read_bytes()[1:])


def touch_corpus(partial: Path, corpus: Path) -> None:
    os.utime(corpus / "3.jsonl", (0, 0))


def change_tokenizer(partial: Path, corpus: Path) -> None:
    path = partial / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_shard, r"shard-00000\.npy changed"),
        (cut_open_shard, r"shard-\d+\.npy changed"),
        (delete_index, r"shard-00000\.ends\.u64 is missing"),
        (change_mask, r"shard-00000\.mask\.u8 changed"),
        (touch_corpus, "other settings than before: corpus in place"),
        (change_tokenizer, r"tokenizer\.json changed"),
    ],
)
def test_what_is_not_as_it_was_left_is_done_again(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path, Path], None],
    reason: str,
) -> None:
    options = {"shard_tokens": 1500, "records": Records.prompt_completion}
    cfg = config(tmp_path / "data", corpus, **options)
    change(interrupt(monkeypatch, cfg, 6), corpus)
    capsys.readouterr()
    prepare(cfg, LIMITS)
    printed = capsys.readouterr().out
    assert "starting over" in printed
    assert re.search(reason, printed)
    prepare(config(tmp_path / "whole", corpus, **options), LIMITS)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_strict_run_goes_on_in_quarantine(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad record late in a long corpus does not cost what was done before it."""
    for number in range(3):  # good files first
        lines = (corpus / f"{number}.jsonl").read_text().splitlines()
        (corpus / f"{number}.jsonl").write_text("\n".join(line for line in lines if line != "not JSON"))
    prepare(config(tmp_path / "whole", corpus, shard_tokens=1500), LIMITS)
    given = tmp_path / "whole/tokenizer"
    arguments: dict[str, Any] = {"kind": SourceKind.files, "shard_tokens": 1500, "tokenizer": given}
    arguments["paths"] = [str(corpus)]
    with pytest.raises(UserError, match=r"3\.jsonl:9: malformed JSON"):
        prepare(prepare_config(tmp_path / "data", **arguments), LIMITS)
    kept = json.loads((tmp_path / ".data.partial/progress.json").read_text())
    assert kept["position"]["part"] >= 2
    prepare(config(tmp_path / "data", corpus, shard_tokens=1500, tokenizer=given), LIMITS)
    prepare(config(tmp_path / "given", corpus, shard_tokens=1500, tokenizer=given), LIMITS)
    assert contents(tmp_path / "data") == contents(tmp_path / "given")
