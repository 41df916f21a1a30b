"""Ranks that hang, freeze or die while the others wait: the job ends, and says which rank and where."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.faults.training import at_step, config, run, saved_steps, status
from tests.spawn import RankError, run_ranks

TIMEOUT = 3.0


def hang_in_a_loop() -> None:
    time.sleep(1000)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (hang_in_a_loop, r"rank 1 \(host .*\), step 3: is in hang_in_a_loop \(test_ranks\.py:\d+\)$"),
        (freeze, r"rank 1 \(host .*\), does not answer: dead, frozen, or stuck outside of Python$"),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_place(
    data: Path, tmp_path: Path, fault: object, reason: str
) -> None:
    cfg = config(data, tmp_path, trainer={"timeout": TIMEOUT})
    with pytest.raises(RankError):  # the timeout of run_ranks would say "ranks still running"
        run_ranks(2, run, cfg, partial(at_step, 1, 3, fault), timeout=60)
    ended = status(tmp_path)
    assert ended["state"] == "failed"
    assert ended["reason"].startswith("no progress for trainer.timeout=3 s. Held up by rank 1 ")
    assert re.search(reason, ended["reason"]), ended["reason"]
    log = (tmp_path / "log.txt").read_text()
    # Rank 0 stands in the step's first collective, and its stack says so.
    assert re.search(r"rank 0 \(host .*\): step 3: waits for other ranks in ", log), log
    assert "in count_tokens" in log
    assert saved_steps(tmp_path) == [1, 2]
