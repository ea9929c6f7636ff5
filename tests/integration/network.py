"""Machines of a rehearsal: network namespaces on one switch, whose cables can be cut and slowed.

Knows ``unshare``, ``nsenter``, ``ip`` and ``tc``; nothing of jobs. A namespace lives as long as a process in it, here
a ``cat`` that ends when this process does: nothing is left behind, not even by a test that is killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

# Where Debian has ``tc``; users' PATH leaves it out.
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class UnavailableError(RuntimeError):
    """This machine does not permit it; the reason."""


class Network:
    """A switch, and machines with an address each.

    Args:
        size: How many machines.

    Raises:
        UnavailableError: namespaces, or virtual cables, may not be made here.
    """

    def __init__(self, size: int) -> None:
        missing = [name for name in ("unshare", "nsenter", "ip") if not shutil.which(name, path=_PATH)]
        if missing:
            raise UnavailableError(f"{' and '.join(missing)} not installed")
        self.addresses = [f"10.77.0.{number + 1}" for number in range(size)]
        self._holders: list[subprocess.Popen[str]] = []
        try:
            self._switch = self._hold(["unshare", "--user", "--map-root-user", "--net"])
            self._run(self._switch, "ip link add switch type bridge")
            self._run(self._switch, "ip link set switch up")
            self._machines = [self._plug_in(number) for number in range(size)]
        except BaseException:
            self.close()
            raise

    def command(self, machine: int) -> list[str]:
        """Return the command prefix that runs a command on a machine."""
        return self._inside(self._machines[machine])

    def cut(self, machine: int) -> None:
        """Pull a machine's cable."""
        self._run(self._switch, f"ip link set port{machine} down")

    def mend(self, machine: int) -> None:
        """Put it back."""
        self._run(self._switch, f"ip link set port{machine} up")

    def slow(self, machine: int) -> str:
        """Slow what a machine is sent; return how: by a delay, or by a narrow pipe where the kernel has no netem.

        Raises:
            UnavailableError: it has neither.
        """
        ways = ["netem delay 10ms", "tbf rate 4mbit burst 16kb latency 1s"]
        for way in ways:
            try:
                self._run(self._switch, f"tc qdisc add dev port{machine} root {way}")
                return way
            except UnavailableError as error:
                problem = error
        raise problem

    def at_full_speed(self, machine: int) -> None:
        """Undo `slow`."""
        self._run(self._switch, f"tc qdisc del dev port{machine} root")

    def close(self) -> None:
        """Remove all of it, with what still runs there."""
        for holder in reversed(self._holders):
            holder.kill()
            holder.communicate()

    def _plug_in(self, number: int) -> int:
        enter = ["nsenter", "--target", str(self._switch), "--user", "--preserve-credentials", "unshare", "--net"]
        machine = self._hold(enter)
        self._run(self._switch, f"ip link add port{number} type veth peer name eth0 netns {machine}")
        self._run(self._switch, f"ip link set port{number} master switch up")
        self._run(machine, f"ip address add {self.addresses[number]}/24 dev eth0")
        self._run(machine, "ip link set eth0 up")
        self._run(machine, "ip link set lo up")
        # Connections break after seconds, not after a quarter of an hour.
        self._run(machine, "tee /proc/sys/net/ipv4/tcp_retries2", stdin="4")
        return machine

    def _hold(self, command: Sequence[str]) -> int:
        """Keep a namespace open; return the process that does."""
        pipe = subprocess.PIPE
        holder = subprocess.Popen([*command, "cat"], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._holders.append(holder)
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            holder.stdin.write("there\n")
            holder.stdin.flush()
            there = holder.stdout.readline()
        except BrokenPipeError:
            there = ""
        if not there:
            raise UnavailableError(" ".join(holder.communicate()[1].split()))
        return holder.pid

    @staticmethod
    def _inside(process: int) -> list[str]:
        return ["nsenter", "--target", str(process), "--user", "--net", "--preserve-credentials"]

    def _run(self, process: int, command: str, stdin: str = "") -> None:
        line = [*self._inside(process), *command.split()]
        environment = {**os.environ, "PATH": _PATH}
        done = subprocess.run(line, input=stdin, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise UnavailableError(f"{command}: {' '.join(done.stderr.split())}")
