"""A command whose output nobody reads (`| head -1`) ends without a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe_train.utils.exit_codes import CLOSED_OUTPUT, OK
from tests.support.commands import TINY, command_environment, train_command


def run_unread(*command: str, cwd: Path) -> tuple[int, str]:
    """Run a command with a stdout whose reader has left. Returns (exit code, stderr)."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = subprocess.run(
            command,
            cwd=cwd,
            env=command_environment(),
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    finally:
        os.close(writer)
    return process.returncode, process.stderr


def unread(*arguments: str, cwd: Path) -> None:
    """Run `olmoe` with a stdout whose reader has left, and check that it reports nothing.

    The exit code says whether it noticed: with a buffered stdout not before its end.
    """
    code, stderr = run_unread(sys.executable, "-m", "olmoe_train", *arguments, cwd=cwd)
    assert code in (OK, CLOSED_OUTPUT), stderr
    for word in ("Traceback", "Error", "Exception ignored"):
        assert word not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plan", "--cfg", "job"]])
def test_what_a_command_prints_about_itself(tmp_path: Path, arguments: list[str]) -> None:
    """All verbs print their help and their configuration in the same way (cli/app.py)."""
    unread(*arguments, cwd=tmp_path)


@pytest.mark.slow
def test_work_is_finished_even_if_nobody_reads_its_log(tmp_path: Path) -> None:
    lines = [json.dumps({"id": i, "text": f"document {i} of a few. " * 30}) + "\n" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    data = ("data=jsonl", "data.source.paths=[a.jsonl]", "data.dir=data", "tokenizer.vocab_size=300")
    unread("prepare", *data, cwd=tmp_path)
    assert (tmp_path / "data/manifest.json").is_file()
    code, stderr = run_unread(*train_command("data.dir=data", "run_dir=run", ranks=1), cwd=tmp_path)
    assert code == OK, stderr
    assert "Traceback" not in stderr
    assert "Logging error" not in stderr
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "done"
    assert "step 6" in (tmp_path / "run/log.txt").read_text()
    unread("export", "source=run", "step=latest", "out=hf", cwd=tmp_path)
    assert (tmp_path / "hf/config.json").is_file()
    unread("evaluate", "source=hf", "data.dir=data", cwd=tmp_path)
    unread("plan", "experiment=quickstart", *TINY, "gpus=1", "data.dir=data", cwd=tmp_path)
    unread("generate", "source=hf", "prompt=document", "max_new_tokens=4", cwd=tmp_path)
