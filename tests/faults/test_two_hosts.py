"""Two hosts: a rank or a launcher dies while the other host does not notice, and the run goes on."""

import os
import re
import signal
from pathlib import Path

import pytest

from olmoe_train.checkpoint.directory import checkpoint_path
from tests.support.faults import assert_same_end, saved_steps, status
from tests.support.hosts import must, network, reason_to_skip, wait_until
from tests.support.launcher import Launcher
from tests.support.runs import TINY
from tests.support.sizes import overrides

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]


def test_a_rank_and_then_each_launcher_die(data: Path, twin: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for step in (3, 5, 6):
        (run_dir / f"hold-{step}").touch()
    with network(tmp_path) as cluster:
        host_a, host_b = cluster.hosts["hostA"], cluster.hosts["hostB"]
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


def test_doctor_names_a_slow_link_and_a_full_disk(data: Path, tmp_path: Path) -> None:
    run_dir, doctor = tmp_path / "run", ("-m", "olmoe_train.cli.doctor")
    run_dir.mkdir()
    keys = {"model.vocab_size": 64, "data.dir": data, "run_dir": run_dir, "bandwidth_seconds": 0.1}
    logs = {"hostA": tmp_path / "a.log", "hostB": tmp_path / "b.log"}
    with network(tmp_path) as cluster:
        slow = "tc qdisc add dev eth0 root tbf rate 10mbit burst 16kb latency 50ms"
        must(cluster.hosts["hostB"], *slow.split())
        must(cluster.hosts["hostB"], "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", run_dir)
        words = overrides(TINY | keys)
        both = [
            Launcher(host, logs[name], *words, restarts=0, program=doctor)
            for name, host in cluster.hosts.items()
        ]
        assert [launcher.process.wait(timeout=180) for launcher in both] == [2, 2]
    text = logs["hostA"].read_text()
    assert re.search(r"warning +links +host hostA, rank 0: slow: hostB to hostA: [\d.]+ MB/s;", text), text
    assert re.search(rf"failed +disk_space +host hostB, rank 1: run_dir={run_dir}: 64.0 KiB free", text), text
    assert re.search(r"failed +shared_files +host hostB, rank 1: .+another directory than on rank 0", text)
