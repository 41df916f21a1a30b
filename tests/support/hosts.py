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
        self.holder = holder
        self.pid = wait_for_child(holder.pid)
        while self.run("hostname").stdout.strip() != name or "lo:" not in self.run("ip", "-o", "link").stdout:
            time.sleep(0.02)

    def kill(self) -> None:
        """End all processes of the host."""
        self.holder.kill()
        self.holder.wait()

    def command(self, *command: str | Path) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--all", "--", *map(str, command)]

    def run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self.command(*command), capture_output=True, text=True, timeout=180)


class Network:
    """Hosts on one switch, which outlives them. A cable can be pulled, and a host replaced."""

    def __init__(self, scratch: Path, stack: ExitStack, **addresses: str) -> None:
        """
        Args:
            scratch: For the /etc/hosts of the hosts.
            stack: Ends the hosts.
            addresses: By the name of the host.
        """
        self.addresses, self.stack, self.names = addresses, stack, scratch / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        self.names.write_text("".join(f"{line}\n" for line in lines))
        self.switch = Host("switch", self.names, stack)
        must(self.switch, "ip", "link", "add", "bridge", "type", "bridge")
        must(self.switch, "ip", "link", "set", "bridge", "up")
        self.hosts: dict[str, Host] = {}
        for name in addresses:
            self.start(name)

    def start(self, name: str) -> Host:
        """A host with this name, connected; in the place of one that was killed, if there was one."""
        self.switch.run("ip", "link", "delete", name)
        host = self.hosts[name] = Host(name, self.names, self.stack)
        cable = f"ip link add {name} netns {self.switch.pid} type veth peer name eth0 netns {host.pid}"
        subprocess.run(cable.split(), check=True)
        must(self.switch, "ip", "link", "set", name, "master", "bridge")
        must(host, "ip", "address", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        must(host, "ip", "link", "set", "eth0", "up")
        self.plug_in(name)
        return host

    def pull_out(self, name: str) -> None:
        must(self.switch, "ip", "link", "set", name, "down")

    def plug_in(self, name: str) -> None:
        must(self.switch, "ip", "link", "set", name, "up")


@contextmanager
def network(scratch: Path) -> Iterator[Network]:
    """hostA and hostB on one switch. scratch: for their /etc/hosts."""
    with ExitStack() as stack:
        yield Network(scratch, stack, hostA="10.77.0.1", hostB="10.77.0.2")


def must(host: Host, *command: str | Path) -> str:
    """Run a command on the host, which must succeed; returns what it prints."""
    result = host.run(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


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
