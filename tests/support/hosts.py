"""Hosts on one machine: processes with a network, a host name and process IDs of their own. Needs root."""

import functools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NAMESPACES = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
# PID 1 of a host: prepares it, and then reaps processes whose parent has died.
BOOT = """set -e
hostname "$1"
mount --bind "$2" /etc/hosts
ip link set lo up
while :; do sleep 1000; done"""


@functools.cache
def reason_to_skip(*programs: str) -> str:
    """Why hosts cannot be made here, or an empty string. programs: other commands that are needed."""
    missing = [name for name in ("unshare", "nsenter", "ip", *programs) if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    made = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True)
    return f"cannot make namespaces: {made.stderr.strip()}" if made.returncode else ""


class Host:
    """A host that lives until the `ExitStack` closes, which ends all of its processes."""

    def __init__(self, name: str, names: Path, stack: ExitStack) -> None:
        self.name = name
        holder = subprocess.Popen(["unshare", *NAMESPACES, "bash", "-c", BOOT, "bash", name, str(names)])
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        self.pid = wait_for_child(holder.pid)
        while self.run("hostname").stdout.strip() != name or "lo:" not in self.run("ip", "-o", "link").stdout:
            time.sleep(0.02)

    def command(self, *command: str | Path) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--all", "--", *map(str, command)]

    def run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self.command(*command), capture_output=True, text=True, timeout=180)


@contextmanager
def two_hosts(scratch: Path) -> Iterator[tuple[Host, Host]]:
    """hostA and hostB, with a cable between them. scratch: for their /etc/hosts."""
    names = scratch / "hosts"
    names.write_text("127.0.0.1 localhost\n10.77.0.1 hostA\n10.77.0.2 hostB\n")
    with ExitStack() as stack:
        a, b = Host("hostA", names, stack), Host("hostB", names, stack)
        cable = f"ip link add eth0 netns {a.pid} type veth peer name eth0 netns {b.pid}"
        subprocess.run(cable.split(), check=True)
        for host, address in ((a, "10.77.0.1"), (b, "10.77.0.2")):
            subprocess.run(host.command("ip", "address", "add", f"{address}/24", "dev", "eth0"), check=True)
            subprocess.run(host.command("ip", "link", "set", "eth0", "up"), check=True)
        yield a, b


def children(pid: int) -> list[int]:
    """Return the process IDs, as this process sees them, of the children of `pid`."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def wait_for_child(pid: int) -> int:
    """Return the process ID of the first child of `pid`, as soon as there is one."""
    until = time.monotonic() + 60
    while not (found := children(pid)):
        assert time.monotonic() < until, f"process {pid} has no child"
        time.sleep(0.02)
    return found[0]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.1)
