"""Signals to a running rank: it saves once and says so in its exit code, or leaves at once."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from olmoe_train.checkpoint import saver
from olmoe_train.checkpoint import sharded as training
from olmoe_train.checkpoint.directory import checkpoint_path, verify
from olmoe_train.run.signals import SECONDS_BETWEEN_INTERRUPTS
from olmoe_train.utils.exit_codes import STOPPED_BY_SIGNAL
from tests.support.faults import alerts, assert_same_end, at_step, config, metrics, run, saved_steps, status
from tests.support.ranks import RankError, run_ranks

STOPPED = [STOPPED_BY_SIGNAL] * 2
ONLY_AT_THE_END = {"every": 0, "keep": 0}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_saves_at_one_step_of_all(
    data: Path, twin: Path, tmp_path: Path, number: int
) -> None:
    cfg = config(data, tmp_path, checkpoint=ONLY_AT_THE_END)
    assert run_ranks(2, run, cfg, partial(at_step, 1, 3, partial(send, number))) == STOPPED
    assert saved_steps(tmp_path) == [3]
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("stopped", 3)
    assert run_ranks(2, run, cfg) == [0, 0]
    assert_same_end(tmp_path, twin)
    assert alerts(tmp_path) == ["stopped at step 3"]
    told = [(row["step"], row["alerts"]) for row in metrics(tmp_path) if "alerts" in row]
    assert [(step, [alert["name"] for alert in new]) for step, new in told] == [(4, ["stopped at step 3"])]


def signal_while_saving(step: int) -> None:
    """SIGTERM to rank 1 as it hashes what it has written."""
    original = training.entry_of

    def signalling(path: Path) -> dict[str, Any]:
        if f"{step:08d}.partial" in str(path) and dist.get_rank() == 1:
            send(signal.SIGTERM)
        return original(path)

    training.entry_of = signalling


def test_a_signal_during_a_save_finishes_that_one_and_begins_no_other(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, checkpoint={"every": 2, "keep": 0})
    assert run_ranks(2, run, cfg, partial(signal_while_saving, 2)) == STOPPED
    assert saved_steps(tmp_path) == [2]
    assert status(tmp_path)["step"] == 2


def save_slowly() -> None:
    original = saver.write_checkpoint

    def slow(*arguments: Any) -> Path:
        time.sleep(2.0)
        return original(*arguments)

    saver.write_checkpoint = slow


def test_a_signal_during_an_async_save_too(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, trainer={"max_steps": 500}, checkpoint={"every": 2, "async_save": True})
    # Step 2 is on its way when the signal comes in step 3; the save of step 3 or 4 never begins.
    stop = partial(at_step, 0, 3, partial(send, signal.SIGTERM))
    assert run_ranks(2, run, cfg, save_slowly, stop) == STOPPED
    assert saved_steps(tmp_path) == [2]
    assert status(tmp_path)["step"] == 2


def interrupt_twice_and_hang() -> None:
    send(signal.SIGINT)
    time.sleep(SECONDS_BETWEEN_INTERRUPTS + 0.3)
    send(signal.SIGINT)
    time.sleep(60)


def interrupt_twice_at_once() -> None:
    send(signal.SIGINT)
    time.sleep(0.1)
    send(signal.SIGINT)


def test_a_second_interrupt_leaves_at_once(data: Path, tmp_path: Path) -> None:
    # Rank 1 interrupts itself; rank 0 waits for it in a collective meanwhile.
    fault = partial(at_step, 1, 3, interrupt_twice_and_hang)
    with pytest.raises(RankError, match="rank 1: died without a word, exit code 130"):
        run_ranks(2, run, config(data, tmp_path), fault, timeout=30)
    assert saved_steps(tmp_path) == [1, 2]
    verify(checkpoint_path(tmp_path, 2))
    assert "a second interrupt: left at once" in (tmp_path / "log.txt").read_text()


def test_one_interrupt_that_arrives_twice_is_one(data: Path, tmp_path: Path) -> None:
    fault = partial(at_step, 0, 3, interrupt_twice_at_once)
    assert run_ranks(2, run, config(data, tmp_path), fault) == STOPPED
    assert saved_steps(tmp_path) == [1, 2, 3]
