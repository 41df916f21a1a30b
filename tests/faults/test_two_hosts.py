"""Two hosts: a rank or a launcher dies while the other host does not notice, and the run goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe_train.checkpoint.directory import checkpoint_path
from tests.support.faults import assert_same_end, saved_steps, status
from tests.support.hosts import Host, reason_to_skip, two_hosts, wait_for_child, wait_until

REPO = Path(__file__).parents[2]
OPTIONS = [
    *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=hostA:29400", "--rdzv-id=test"),
    "--rdzv-conf=keep_alive_interval=1",  # seconds; a host that is silent three times is taken for dead
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]


class Launcher:
    """`olmoe_train.cli.torchrun` on one host, with one worker."""

    def __init__(self, host: Host, log: Path, *arguments: str | Path) -> None:
        program = str(REPO / "tests/faults/held.py")
        command = [sys.executable, "-m", "olmoe_train.cli.torchrun", *OPTIONS, program]
        environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            host.command(*command, *arguments),
            env=environment,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
        )

    @property
    def pid(self) -> int:
        """Process ID of the launcher; `process` is nsenter's, which waits for it."""
        return wait_for_child(self.process.pid)

    @property
    def worker(self) -> int:
        return wait_for_child(self.pid)

    def kill(self) -> None:
        """Kill the launcher, and wait for its worker, which ends by itself."""
        worker = self.worker
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not Path(f"/proc/{worker}").exists(), 10, "the end of a worker without a launcher")


def test_a_rank_and_then_each_launcher_die(data: Path, twin: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for step in (3, 5, 6):
        (run_dir / f"hold-{step}").touch()
    with two_hosts(tmp_path) as (host_a, host_b):
        first = Launcher(host_a, tmp_path / "a.log", data, run_dir)
        second = Launcher(host_b, tmp_path / "b.log", data, run_dir)
        wait_until(lambda: 2 in saved_steps(run_dir), 60, "step 2")
        # The launcher of hostB restarts a worker that has not failed, and does not count that; hostA's does.
        os.kill(second.worker, signal.SIGSTOP)
        os.kill(first.worker, signal.SIGKILL)
        (run_dir / "hold-3").unlink()
        # torchrun gives the stopped worker 30 s to end.
        wait_until(lambda: 4 in saved_steps(run_dir), 90, "step 4, after a restart of both workers")
        second.kill()
        (run_dir / "hold-5").unlink()
        second = Launcher(host_b, tmp_path / "b.log", data, run_dir)
        wait_until(lambda: 5 in saved_steps(run_dir), 90, "step 5, with a new launcher on hostB")
        first.kill()  # the host of the rendezvous
        (run_dir / "hold-6").unlink()
        first = Launcher(host_a, tmp_path / "a.log", data, run_dir)
        assert [first.process.wait(timeout=90), second.process.wait(timeout=90)] == [0, 0]
    log = (run_dir / "log.txt").read_text()
    for step in (2, 4, 5):
        assert f"resumed from {checkpoint_path(run_dir, step)}" in log
    assert_same_end(run_dir, twin)
    assert status(run_dir)["state"] == "done"
