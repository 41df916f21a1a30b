"""`olmoe_train.cli.torchrun` on a host of `hosts.py`, with one worker."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.hosts import Host, wait_for_child, wait_until

REPO = Path(__file__).parents[2]
HELD = (str(REPO / "tests/faults/held.py"),)
# Seconds between two signs of life. A host that gives none three times is taken for dead.
KEEP_ALIVE = "keep_alive_interval=1"


class Launcher:
    def __init__(
        self,
        host: Host,
        log: Path,
        *arguments: str | Path,
        nodes: str = "2",
        rendezvous: str = KEEP_ALIVE,
        restarts: int = 3,
        program: tuple[str, ...] = HELD,
    ) -> None:
        """
        Args:
            host: Where it runs.
            log: What launcher and worker print; appended to.
            arguments: Of the program.
            nodes: torchrun's --nnodes.
            rendezvous: torchrun's --rdzv-conf.
            restarts: torchrun's --max-restarts.
            program: As torchrun takes it.
        """
        options = [
            *(f"--nnodes={nodes}", "--nproc-per-node=1", f"--max-restarts={restarts}"),
            f"--rdzv-conf={rendezvous}",
            *("--rdzv-backend=c10d", "--rdzv-endpoint=hostA:29400", "--rdzv-id=test"),
        ]
        command = [sys.executable, "-m", "olmoe_train.cli.torchrun", *options, *program]
        # LOGLEVEL: torchrun then says when it has seen another host.
        changes = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO"}
        self.process = subprocess.Popen(
            host.command(*command, *arguments),
            env=os.environ | changes,
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
