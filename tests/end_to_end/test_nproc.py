"""`olmoe train --nproc N`: ranks on this machine, their exit codes, and the last words of a failed run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

import pytest
import torch

from olmoe_train.cli.ranks import on_ranks
from tests.support.commands import MODEL, command_environment, olmoe
from tests.support.faults import status, write_data
from tests.support.hosts import children
from tests.support.sizes import overrides, section

STEPS = 10**6  # a signal ends these runs
RUN = [
    *overrides(section("model", MODEL | {"vocab_size": 64})),
    *("data.sequence_length=16", "trainer.global_batch_size=4", "trainer.micro_batch_size=2"),
    *(
        f"trainer.max_steps={STEPS}",
        "trainer.log_every=1",
        "checkpoint.every=0",
        "logging.wandb.mode=disabled",
    ),
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("nproc") / "data")


@contextmanager
def training(flag: str, data_dir: Path, run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """`olmoe train` with two ranks in a process group of its own, two steps after it started or resumed."""
    command = [sys.executable, "-m", "olmoe_train", "train", *flag.split(), *RUN]
    metrics = run_dir / "metrics.jsonl"
    before = metrics.read_text().count("\n") if metrics.is_file() else 0
    with subprocess.Popen(
        [*command, f"data.dir={data_dir}", f"run_dir={run_dir}"],
        env=command_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not (
            metrics.is_file() and metrics.read_text().count("\n") >= before + 2
        ):
            time.sleep(0.05)
        try:
            yield process
        finally:
            process.kill()


def rank_of(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next(int(variable[5:]) for variable in variables if variable.startswith(b"RANK="))


def test_signals_save_on_all_ranks_and_a_killed_rank_is_named(data_dir: Path, tmp_path: Path) -> None:
    """The second attempt resumes from what Ctrl-C saved, and the third from what SIGTERM saved."""
    with training("--nproc 2", data_dir, tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends Ctrl-C: to the launcher and the ranks
        assert process.wait(timeout=60) == 75
    stopped_at = status(tmp_path)["step"]
    assert (tmp_path / "checkpoints" / f"step-{stopped_at:08d}").is_dir()

    with training("--nproc-per-node=2", data_dir, tmp_path) as process:
        assert {rank_of(child) for child in children(process.pid)} == {0, 1}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
    assert status(tmp_path)["state"] == "stopped"
    assert status(tmp_path)["step"] > stopped_at

    with training("--nproc 2", data_dir, tmp_path) as process:
        (victim,) = (child for child in children(process.pid) if rank_of(child) == 1)
        os.kill(victim, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: rank 1 (host {gethostname()}, process {victim}) was killed by SIGKILL;")
    assert "ChildFailedError" not in errors  # the traceback of rank 0, which lost rank 1, is there


def test_a_refused_configuration_has_the_last_word(data_dir: Path, tmp_path: Path) -> None:
    wrong = [f"data.dir={data_dir}", "trainer.global_batch_size=6"]  # not a multiple of 2 sequences x 2 ranks
    result = olmoe("train", "--nproc", "2", *RUN, *wrong, "run_dir=run", cwd=tmp_path)
    assert result.returncode == 2
    head = r"error: 1 error in the configuration:\n  - trainer\.global_batch_size=6: must be "
    assert re.fullmatch(head + r".* = 2 x 2 = 4; .*\n", result.stderr)
    assert not (tmp_path / "run").exists()


def test_one_rank_trains_a_sweep_to_the_end(data_dir: Path, tmp_path: Path) -> None:
    """auto is one rank, on a machine without GPUs. The wrong run stops no other, and is tried again."""
    short = [f"data.dir={data_dir}", "trainer.max_steps=2", "run_dir=sweep"]
    sweep = ["train", "--multirun", *RUN, "--nproc=auto", *short, "trainer.micro_batch_size=3,4"]
    result = olmoe(*sweep, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "run 1 of 2 ended with exit code 2: trainer.micro_batch_size-3" in result.stderr
    directory = tmp_path / "sweep"
    assert status(directory / "trainer.micro_batch_size-4")["state"] == "done"
    table = (directory / "sweep.md").read_text()
    assert table in result.stdout
    assert re.search(r"^\| 4 \| 1 \| [0-9.]+ \| [0-9.]+ \| [0-9.]+ \|$", table, re.MULTILINE)
    assert "Not done: trainer.micro_batch_size-3" in table
    before = (directory / "trainer.micro_batch_size-4" / "status.json").read_text()
    again = olmoe(*sweep, cwd=tmp_path)
    assert "run 2 of 2: trainer.micro_batch_size-4 is done" in again.stdout
    assert (directory / "trainer.micro_batch_size-4" / "status.json").read_text() == before


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the message with which `olmoe train ARGUMENTS` is refused."""
    monkeypatch.setattr(sys, "argv", ["olmoe", *arguments])
    assert on_ranks("not_to_be_started", lambda: pytest.fail("trained in this process")) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "abc", "1.5", ""])
def test_a_wrong_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    message = refused(monkeypatch, capsys, "run_dir=run", "--nproc", value)
    assert message == f"error: --nproc={value}: must be a number of ranks, at least 1, or auto\n"


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--nproc=3: is more than the GPUs of this machine; give at most 2," in refused(
        monkeypatch, capsys, "--nproc-per-node=3"
    )


def test_a_rank_of_torchrun_starts_no_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(monkeypatch, capsys, "--nproc", "2")
    assert "--nproc=2: this process is a rank already (RANK, WORLD_SIZE in the environment)" in message


def test_flags_that_print_something_start_no_ranks(tmp_path: Path) -> None:
    for flag, printed in (("--help", "--nproc or --nproc-per-node N: start"), ("--cfg=job", "max_epochs: ")):
        result = olmoe("train", "--nproc", "2", flag, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count(printed) == 1  # two ranks would print it twice
