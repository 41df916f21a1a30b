"""Two hosts under `--nnodes=1:2`: a cut network, a host that is replaced, a full disk, and a slow link."""

import json
import re
import time
from functools import partial
from pathlib import Path

import pytest

from olmoe_train.checkpoint.directory import checkpoint_path, verify
from tests.support.faults import config, metrics, run, saved_steps, status
from tests.support.hosts import must, network, reason_to_skip, wait_until
from tests.support.launcher import KEEP_ALIVE, Launcher
from tests.support.ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_to_skip("tc")), reason=reason_to_skip("tc")),
]
STEPS = 9
CUT_S, TIMEOUT_S = 20, 40
"""The network is cut for CUT_S seconds. The kernel sends again after 0.2, 0.6, ..., 12.6, 25.4 s; until then
the run stands still."""
# Over a directory that hosts share: what this host writes there goes to a file system of 64 KiB.
SMALL_DISK = """set -e
mkdir "$2"
mount -t tmpfs -o size=64k tmpfs "$2"
mkdir "$2/upper" "$2/work"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$1"
"""
CHANGES = {"parallel": {"expert_parallel_size": 1}, "trainer": {"max_steps": STEPS}}


def test_a_run_goes_on_with_the_hosts_that_are_there(data: Path, tmp_path: Path) -> None:
    twin, run_dir = tmp_path / "twin", tmp_path / "run"
    run_ranks(1, run, config(data, twin, **CHANGES))
    run_dir.mkdir()
    holds = [run_dir / f"hold-{step}" for step in (3, 5, 7, 8, 9)]
    for hold in holds:
        hold.touch()
    changes = CHANGES | {"trainer": {"max_steps": STEPS, "timeout": TIMEOUT_S}}
    arguments = (data, run_dir, json.dumps(changes))
    a_log, b_log, log = tmp_path / "a.log", tmp_path / "b.log", run_dir / "log.txt"
    launch = partial(Launcher, nodes="1:2", rendezvous=f"{KEEP_ALIVE},last_call_timeout=3")

    def said(file: Path, text: str, seconds: float) -> None:
        wait_until(lambda: text in file.read_text(), seconds, f"{text!r} in {file.name}")

    with network(tmp_path) as cluster:
        first = launch(cluster.hosts["hostA"], a_log, *arguments)
        launch(cluster.hosts["hostB"], b_log, *arguments)
        wait_until(lambda: 2 in saved_steps(run_dir), 120, "step 2")

        cluster.pull_out("hostB")
        holds.pop(0).unlink()
        time.sleep(CUT_S)
        cluster.plug_in("hostB")
        wait_until(lambda: 4 in saved_steps(run_dir), 60, "step 4, after the network is back")
        assert "resumed" not in log.read_text()

        # Without an answer the kernel gives a connection up after 50 s; its default is 15 minutes.
        must(cluster.hosts["hostB"], "sysctl", "-w", "net.ipv4.tcp_retries2=7")
        cluster.pull_out("hostB")
        holds.pop(0).unlink()
        wait_until(lambda: 6 in saved_steps(run_dir), 180, "step 6, on hostA alone")
        said(b_log, "error: host hostB: no connection to the host of the rendezvous", 90)
        cluster.hosts["hostB"].kill()

        host_b = cluster.start("hostB")
        second = launch(host_b, b_log, *arguments)
        said(a_log, "Detected 1 new nodes", 90)
        time.sleep(1)  # until the worker has the signal to save
        holds.pop(0).unlink()
        said(log, f"resumed from {checkpoint_path(run_dir, 7)}", 120)

        must(host_b, "bash", "-c", SMALL_DISK, "bash", run_dir / "checkpoints", tmp_path / "small")
        holds.pop(0).unlink()
        said(log, "saving failed", 60)
        must(host_b, "umount", run_dir / "checkpoints")
        slow = "tc qdisc add dev eth0 root tbf rate 10mbit burst 16kb latency 50ms"
        must(host_b, *slow.split())
        holds.pop(0).unlink()
        assert [first.process.wait(timeout=120), second.process.wait(timeout=120)] == [0, 0]

    assert [record["step"] for record in metrics(run_dir)] == list(range(1, STEPS + 1))
    for name in ("train/loss", "train/load_balancing_loss", "train/grad_norm"):
        ours, of_twin = ([record[name] for record in metrics(one)] for one in (run_dir, twin))
        assert ours == pytest.approx(of_twin, rel=1e-5), name
    assert saved_steps(run_dir) == [1, 2, 3, 4, 5, 6, 7, 9]
    for step in saved_steps(run_dir):
        verify(checkpoint_path(run_dir, step))
    assert status(run_dir)["state"] == "done"

    text = log.read_text()
    cut = (
        rf"ERROR: no progress for trainer.timeout={TIMEOUT_S} s. Held up by rank 1 \(host hostB, .+\), "
        r"step 5: waits for other ranks in .+, and has no connection to rank 0 \(host hostA\): hostA:\d+: "
    )
    for host in (text, b_log.read_text()):
        assert re.search(cut, host), host
    for ranks, micro_batches in (("from 2 to 1", "from 1 to 2"), ("from 1 to 2", "from 2 to 1")):
        changed = (
            f"the number of ranks has changed {ranks}, and the micro-batches of each rank in a step of 4 "
        )
        assert changed + f"sequences {micro_batches};" in text
    full = (
        r"WARNING: saving failed, 1 of at most 3 times in a row; training goes on: .+/.step-00000008.partial"
        r": rank 1 \(host hostB, process \d+\): .+No space left on device"
    )
    assert re.search(full, text), text
