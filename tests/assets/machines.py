"""Simulated computers: each in uts, mount, pid and network namespaces of its own, joined by a bridge.

One of them, the switch, holds the bridge, and a cable from it reaches this host. Nothing has a name outside: when the
test process ends, however it ends, every process of every machine does, and with them networks, mounts and cables.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from debian import Missing

DAEMON_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT_S = 20.0

# pid 1 of a machine: sets it up, tells its number on the host, and lives until the test process closes standard input.
# bash, because it reaps orphans while it reads. Arguments: name, file for the number, pairs (source, target) to bind.
_INIT = """
set -eu
read -r pid _ </proc/self/stat
hostname "$1"; told=$2; shift 2
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
ip link set lo up
echo "$pid" >"$told.new"; mv "$told.new" "$told"
read -r _ || :
"""


class Machine:
    """`folder` gets <name>.pid and <name>.out; `mounts`: host path -> path in the machine, both existing."""

    def __init__(self, name: str, folder: Path, mounts: Mapping[Path, Path], environ: Mapping[str, str]) -> None:
        self.name = name
        self.mounts = mounts
        self.environ = {"PATH": DAEMON_PATH, "LANG": "C.UTF-8", **environ}
        self.pid = 0  # of its pid 1, on the host; 0: off
        self._told = folder / f"{name}.pid"
        self._output = folder / f"{name}.out"
        self._power: int | None = None  # the pipe's end that keeps it on

    def boot(self) -> None:
        """Raises Missing where namespaces can't be made.

        The machine is no child of this process, and has nothing of its environment: a test that boots one owns it not.
        """
        self._told.unlink(missing_ok=True)
        held, self._power = os.pipe()
        binds = [str(path) for pair in self.mounts.items() for path in pair]
        unshare = ["unshare", "--uts", "--mount", "--pid", "--net", "--fork", "--kill-child"]
        command = ["setsid", "--fork", *unshare, "bash", "-c", _INIT, "init", self.name, str(self._told), *binds]
        with open(self._output, "wb") as output:
            subprocess.run(command, stdin=held, stdout=output, stderr=output, env=self.environ, cwd="/", check=True)
        os.close(held)
        deadline = time.monotonic() + BOOT_S
        while not self._told.exists():
            said = self._output.read_text(errors="replace")
            if "unshare:" in said or time.monotonic() > deadline:
                raise Missing(f"machine {self.name} can't start: namespaces and mounts need a privileged root. {said}")
            time.sleep(0.01)
        self.pid = int(self._told.read_text())

    def power_off(self) -> None:
        """As if the plug was pulled: everything on it is gone when this returns."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            wait_gone(self.pid)
            self.pid = 0
        if self._power is not None:
            os.close(self._power)
            self._power = None

    def command(self, *argv: str) -> list[str]:
        """`argv` as a command line that runs on the machine."""
        return ["nsenter", f"--target={self.pid}", "--uts", "--mount", "--pid", "--net", "--wd=/", "--", *argv]

    def run(self, *argv: str, timeout_s: float = 30.0) -> str:
        """What it prints, standard error included. Raises RuntimeError. A daemon started so lives on."""
        with open(self._output, "a+b") as output:  # no pipe: a daemon would hold it open
            start = output.seek(0, os.SEEK_END)
            done = subprocess.run(
                self.command(*argv), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environ,
                timeout=timeout_s, check=False,
            )  # fmt: skip
            output.seek(start)
            said = output.read().decode(errors="replace")
        if done.returncode != 0:
            raise RuntimeError(f"{self.name}: {' '.join(argv)}: exit code {done.returncode}: {said}")
        return said

    def processes(self) -> dict[int, str]:
        """Host pid -> command line of what runs on it, its pid 1 left out."""
        return {pid: _command_line(pid) for pid in self._pids() if pid != self.pid and _alive(pid)}

    def named(self, name: str) -> list[int]:
        """Host pids of its processes that run this program."""
        return [pid for pid in self._pids() if _alive(pid) and _read(pid, "comm").strip() == name]

    def _pids(self) -> list[int]:
        if not self.pid:
            return []
        return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _pid_namespace(entry) == self._space]

    @property
    def _space(self) -> str:
        return _pid_namespace(str(self.pid)) or "gone"


class Network:
    """10.213.N.0/24, N one that nobody on this host uses: the switch is .254, this host .253, machine i is .i."""

    def __init__(self) -> None:
        self._claim = socket.socket(socket.AF_UNIX)  # in the abstract namespace: it leaves no file
        self.number = self._claim_number()
        self.host_link = f"dtrain{self.number}"
        self.switch: Machine | None = None

    def _claim_number(self) -> int:
        taken = _ip("-o", "-4", "route", "show", "table", "all")
        for number in range(1, 255):
            with contextlib.suppress(OSError):
                self._claim.bind(f"\0dtrain-tests-network-{number}")
                if f"10.213.{number}." not in taken:
                    return number
                self._claim.close()
                self._claim = socket.socket(socket.AF_UNIX)
        raise Missing("no network 10.213.N.0/24 is free: something on this host uses them all")

    def address(self, place: int) -> str:
        return f"10.213.{self.number}.{place}"

    @property
    def host_address(self) -> str:
        return self.address(253)

    def open(self, switch: Machine) -> None:
        """Raises Missing."""
        self.switch = switch
        try:
            _ip("link", "add", self.host_link, "type", "veth", "peer", "name", "host", "netns", str(switch.pid))
            _ip("address", "add", f"{self.host_address}/24", "dev", self.host_link)
            _ip("link", "set", self.host_link, "up")
            self._on_switch(
                "link add bridge type bridge",
                f"address add {self.address(254)}/24 dev bridge",
                "link set bridge up",
                "link set host master bridge up",
            )
        except RuntimeError as error:
            raise Missing(f"networks can't be made here: {error}") from None

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # gone with the switch
            _ip("link", "delete", self.host_link)
        self._claim.close()

    def plug(self, machine: Machine, place: int) -> None:
        assert self.switch is not None
        with contextlib.suppress(RuntimeError):  # of the machine's life before, which the kernel may still be ending
            self._on_switch(f"link delete port{place}")
        hardware = f"02:d7:00:00:{self.number:02x}:{place:02x}"  # the same at every boot: the others remember it
        self._on_switch(
            f"link add port{place} type veth peer name eth0 address {hardware} netns {machine.pid}",
            f"link set port{place} master bridge up",
        )
        _batch(
            machine.pid,
            f"address add {self.address(place)}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {self.host_address}",
        )

    def cut(self, place: int) -> None:
        """The cable stays in, nothing goes through: packets vanish without a word."""
        self._on_switch(f"link set port{place} nomaster")

    def heal(self, place: int) -> None:
        self._on_switch(f"link set port{place} master bridge")

    def _on_switch(self, *lines: str) -> None:
        assert self.switch is not None
        _batch(self.switch.pid, *lines)


def wait_gone(pid: int, timeout_s: float = 20.0) -> None:
    """Dead is enough: who should reap it may be slow. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while _alive(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not end: {_command_line(pid)}")
        time.sleep(0.01)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr}")
    return done.stdout


def _batch(inside: int, *lines: str) -> None:
    """`ip` commands in the network namespace of process `inside`. Raises RuntimeError."""
    text = "".join(f"{line}\n" for line in lines)
    command = ["nsenter", f"--target={inside}", "--net", "--", "ip", "-batch", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{text}{done.stderr}")


def _pid_namespace(pid: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    return _read(pid, "stat").rpartition(")")[2].strip()[:1] not in ("", "Z", "X")


def _command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace("\0", " ").strip()
