"""SLURM with two nodes on one machine, in a host of its own (`hosts.py`). Needs root, slurm-wlm and munge."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.hosts import Host

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
# No cgroups and no accounting. cred_expire: a job that is put back into the queue waits for so many seconds.
CONFIGURATION = """
ClusterName=one
SlurmctldHost=slurm(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
NodeName=node-[0-1] NodeHostname=slurm NodeAddr=127.0.0.1 Port=[17000-17001] CPUs=1 RealMemory=1000
PartitionName=main Nodes=node-[0-1] Default=YES MaxTime=INFINITE State=UP
"""
# SLURM resolves names only if an interface other than the loopback has an address.
START = """set -e
ip link add eth0 type veth peer name eth1
ip address add 10.77.0.3/24 dev eth0
ip link set eth0 up
ip link set eth1 up
mkdir -p /run/munge
mount -t tmpfs tmpfs /run/munge
chown munge:munge /run/munge
runuser -u munge -- munged
slurmctld -c"""
# The processes of node $1: its daemon; of each step the tasks, by their environment, and their parent.
PROCESSES = """
for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    case $(tr '\\0' ' ' < $process/cmdline) in
        "slurmd -N $1 "*) echo "$pid"; continue ;;
    esac 2>/dev/null
    if tr '\\0' '\\n' < $process/environ | grep -qx "SLURMD_NODENAME=$1"; then
        echo "$pid"
        parent=$(cut -d ' ' -f 4 < $process/stat)
        case $(cat /proc/$parent/comm) in slurmstepd) echo "$parent" ;; esac
    fi
done 2>/dev/null"""


class Slurm:
    """Commands of SLURM, run on its machine."""

    def __init__(self, host: Host, configuration: Path) -> None:
        self.host, self.configuration = host, configuration

    def run(self, *command: str | Path, cwd: Path = Path("/"), **environment: str) -> str:
        words = ["env", f"--chdir={cwd}", f"SLURM_CONF={self.configuration}", *map(str, command)]
        words[2:2] = [f"{name}={value}" for name, value in environment.items()]
        result = self.host.run(*words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.strip()

    def start(self, node: str) -> None:
        """Start the daemon of a node, in place of a lost one."""
        for pid in self._processes(node):
            self.host.run("kill", "-KILL", pid)
        self.run("slurmd", "-N", node)

    def lose(self, node: str) -> None:
        """Stop all processes of a node, as if its network were cut: the daemon, and those of jobs."""
        self.host.run("kill", "-STOP", *self._processes(node))

    def _processes(self, node: str) -> list[str]:
        """Process IDs, as the machine numbers them."""
        return self.host.run("bash", "-c", PROCESSES, "bash", node).stdout.split()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` prints, by name."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, seconds: float, *states: str) -> dict[str, str]:
        """Wait until the job is in one of the states."""
        until = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < until, f"not {' or '.join(states)} within {seconds} s: {job}"
            time.sleep(0.3)
        return job


@contextmanager
def slurm_cluster(directory: Path) -> Iterator[Slurm]:
    (directory / "state").mkdir()
    configuration, names = directory / "slurm.conf", directory / "hosts"
    configuration.write_text(CONFIGURATION.format(directory=directory))
    names.write_text("127.0.0.1 localhost slurm node-0 node-1\n")
    with ExitStack() as stack:
        slurm = Slurm(Host("slurm", names, stack), configuration)
        slurm.run("bash", "-c", START)
        for node in ("node-0", "node-1"):
            slurm.start(node)
        until = time.monotonic() + 30
        while slurm.run("sinfo", "-h", "-t", "idle", "-o", "%D") != "2":
            assert time.monotonic() < until, slurm.run("sinfo")
            time.sleep(0.2)
        yield slurm
