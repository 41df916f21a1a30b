"""Ranks that hang, freeze or die while the others wait: the job ends, and says which rank and where."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from olmoe_train.checkpoint.directory import checkpoint_path
from olmoe_train.distributed.mesh import init_distributed
from olmoe_train.run.watchdog import Watchdog
from olmoe_train.training import build
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import FAILED
from tests.support.faults import alerts, assert_same_end, at_step, config, run, saved_steps, status
from tests.support.ranks import RankError, run_ranks

TIMEOUT = 3.0


def hang_in_a_loop() -> None:
    time.sleep(1000)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (hang_in_a_loop, r"rank 1 \(host .*\), step 2: is in hang_in_a_loop \(test_ranks\.py:\d+\)$"),
        (
            freeze,
            r"rank 1 \(host .*\), does not answer: dead, frozen, stuck outside of Python, or on a host that",
        ),
    ],
    ids=["hangs", "frozen"],
)
def test_a_rank_that_hangs_is_named_with_its_place(
    data: Path, tmp_path: Path, fault: Callable[[], None], reason: str
) -> None:
    cfg = config(data, tmp_path, trainer={"timeout": TIMEOUT})
    with pytest.raises(RankError) as caught:
        run_ranks(2, run, cfg, partial(at_step, 1, 3, fault), timeout=60)
    assert "still running" not in str(caught.value)  # one that is frozen is killed
    ended = status(tmp_path)
    assert ended["state"] == "failed"
    assert ended["reason"].startswith("no progress for trainer.timeout=3 s. Held up by rank 1 ")
    assert re.search(reason, ended["reason"]), ended["reason"]
    log = (tmp_path / "log.txt").read_text()
    # Rank 0 stands in the step's first collective, and its stack says so.
    assert re.search(r"rank 0 \(host .*\): step 3: waits for other ranks in ", log), log
    assert "in count_tokens" in log
    assert saved_steps(tmp_path) == [1, 2]


def warned_of(run_dir: Path, what: str) -> list[str]:
    return re.findall(rf"WARNING: rank (\d) \(host .*\) {what}", (run_dir / "log.txt").read_text())


def read_slowly(rank: int) -> None:
    original = build.train_batches

    def slowly(*arguments: Any) -> Iterator[Any]:
        for batch in original(*arguments):
            if dist.get_rank() == rank:
                time.sleep(0.4)
            yield batch

    build.train_batches = slowly


def test_a_rank_that_is_late_with_its_batches_is_named(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, trainer={"log_every": 6}, checkpoint={"every": 0})
    assert run_ranks(2, run, cfg, partial(read_slowly, 1)) == [0, 0]
    assert warned_of(tmp_path, "is late: it waited") == ["1"]
    assert alerts(tmp_path) == ["straggler: rank 1"]


def compute_slowly(rank: int) -> None:
    """Matrix products take this rank thirty times as much work, as on a throttled processor."""
    original = torch.mm

    def slowly(left: Tensor, right: Tensor, **options: Any) -> Tensor:
        if dist.get_rank() == rank:
            for _ in range(29):
                original(left, right)
        return original(left, right, **options)

    torch.mm = slowly


def test_a_rank_that_computes_slowly_is_named(data: Path, tmp_path: Path) -> None:
    model = {"vocab_size": 4096, "hidden_size": 64}  # enough to do, for a time to mean something
    trainer = {"max_steps": 10, "log_every": 10}
    cfg = config(data, tmp_path, model=model, trainer=trainer, checkpoint={"every": 0})
    assert run_ranks(2, run, cfg, partial(compute_slowly, 1)) == [0, 0]
    assert warned_of(tmp_path, "computes slowly:") == ["1"]


# --- one run per directory, and its port ------------------------------------------------------------------

TRY_TO_LOCK = "import sys; from pathlib import Path; from olmoe_train.run.lock import RunLock; "
TRY_TO_LOCK += "RunLock(Path(sys.argv[1])); print('locked')"


def lock_elsewhere(run_dir: Path, said: Path) -> None:
    """As a second `olmoe train` would, while this one is training."""
    command = [sys.executable, "-c", TRY_TO_LOCK, str(run_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said.write_text(f"{os.getpid()}\n{result.stdout}{result.stderr}")


def test_a_second_run_in_the_same_directory_is_told_whose_it_is(
    data: Path, twin: Path, tmp_path: Path
) -> None:
    second = partial(lock_elsewhere, tmp_path / "run", tmp_path / "said")
    run_ranks(2, run, config(data, tmp_path / "run"), partial(at_step, 0, 3, second))
    assert_same_end(tmp_path / "run", twin)  # and the first one noticed nothing
    pid, *said = (tmp_path / "said").read_text().splitlines()
    assert "still going on" in said[-1]
    assert f"host {socket.gethostname()}, process {pid})" in said[-1]
    # Once it is over the directory is free, and nothing is said of it.
    lock_elsewhere(tmp_path / "run", tmp_path / "said")
    assert (tmp_path / "said").read_text().splitlines()[1:] == ["locked"]


def join_at(port: int) -> str:
    """Rank 0 of a group that meets at this port."""
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(UserError) as caught:
        init_distributed("cpu")
    os.environ["MASTER_PORT"] = "0"
    init_distributed("cpu")  # for the harness
    return str(caught.value)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = run_ranks(1, join_at, port)[0]
    assert f"MASTER_PORT={port}" in message
    assert "in use" in message


# --- ranks that do not meet -------------------------------------------------------------------------------


def test_ranks_that_do_not_come_are_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options = ["experiment=quickstart", "data.dir=nowhere", "trainer.rendezvous_timeout=2"]
    command = [sys.executable, "-m", "olmoe_train.train", *options]
    result = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, timeout=60)
    last_line = result.stderr.splitlines()[-1]
    assert result.returncode == FAILED, result.stderr
    assert re.search(r"^error: rank 0 \(host .*\) waited trainer\.rendezvous_timeout=2 s ", last_line)
    assert last_line.endswith(" for ranks 1, 2")


def freeze_once_the_watchdog_is_closed(rank: int) -> None:
    original = Watchdog.close

    def closing(watchdog: Watchdog) -> None:
        original(watchdog)
        if dist.get_rank() == rank:
            freeze()

    Watchdog.close = closing


def test_a_rank_that_freezes_at_the_very_end(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path, trainer={"rendezvous_timeout": TIMEOUT})
    with pytest.raises(RankError, match="rank 0: died without a word, exit code 1"):
        run_ranks(2, run, cfg, partial(freeze_once_the_watchdog_is_closed, 1), timeout=60)
    ended = status(tmp_path)
    assert ended["state"] == "failed"
    assert re.search(r"^rank 0 \(.*\) waited trainer\.rendezvous_timeout=3 s .* at the end ", ended["reason"])
    assert saved_steps(tmp_path)[-1] == 6


# --- under torchrun ---------------------------------------------------------------------------------------


def test_torchrun_restarts_and_the_run_goes_on(data: Path, twin: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_once.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "--max-restarts=1", str(script), str(data), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path, twin)
    assert f"resumed from {checkpoint_path(tmp_path, 3)}" in (tmp_path / "log.txt").read_text()
    assert status(tmp_path)["state"] == "done"
