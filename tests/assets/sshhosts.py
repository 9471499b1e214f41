"""Machines that ssh reaches: each an sshd of its own on this one's loopback, with keys of its own, which can be cut off
or lose power. Their names are those of an ssh configuration.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import debian
import psutil
from freeports import free_ports

NAMES = ("node1", "node2", "node3", "node4")
SSHD = "/usr/sbin/sshd"
_CONFIG = """\
ListenAddress 127.0.0.1:{port}
HostKey {root}/host_key
AuthorizedKeysFile {root}/key.pub
PidFile {root}/{name}.pid
StrictModes no
UsePAM no
PasswordAuthentication no
MaxStartups 100
"""
_CLIENT = """\
Host {name}
  HostName 127.0.0.1
  Port {port}
  HostKeyAlias nodes
"""
_CLIENTS = """\
Host *
  User {user}
  IdentityFile {root}/key
  IdentitiesOnly yes
  UserKnownHostsFile {root}/known_hosts
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SshHosts:
    root: Path
    ports: dict[str, int]
    running: dict[str, int]  # name -> number of its sshd

    @property
    def options(self) -> list[str]:
        return ["-F", str(self.root / "ssh_config")]

    def boot(self, name: str) -> None:
        """A daemon, and no child of the test that boots it: it is there for the others, too."""
        environ = {key: value for key, value in os.environ.items() if key != "DTRAIN_TEST_ID"}
        log = self.root / f"{name}.log"
        subprocess.run(
            [SSHD, "-f", str(self.root / f"{name}.conf"), "-E", str(log)], check=True, timeout=60, env=environ
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError), socket.create_connection(("127.0.0.1", self.ports[name]), 1):
                self.running[name] = int(self._pid_file(name).read_text())
                return
            time.sleep(0.02)
        raise RuntimeError(f"sshd of {name} does not answer: {log.read_text()}")

    def cut_off(self, name: str) -> None:
        """No connection any more, neither new ones nor those that are open; what was started goes on."""
        sshd = psutil.Process(self.running.pop(name))
        for process in [sshd, *sshd.children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([sshd], timeout=10)
        self._pid_file(name).unlink(missing_ok=True)

    def close(self) -> None:
        for name in list(self.running):
            self.cut_off(name)

    def _pid_file(self, name: str) -> Path:
        return self.root / f"{name}.pid"


@contextlib.contextmanager
def ssh_hosts(root: Path) -> Iterator[SshHosts]:
    """`root`: an empty directory. Raises debian.Missing."""
    debian.install("sshd", ["openssh-server", "openssh-client"], [SSHD, "ssh", "ssh-keygen"])
    separation = Path("/run/sshd")  # which sshd asks for, and only a service's start makes
    made = os.geteuid() == 0 and not separation.exists()
    if made:
        separation.mkdir(mode=0o755)
    hosts = SshHosts(root=root, ports=dict(zip(NAMES, free_ports(len(NAMES)), strict=True)), running={})
    try:
        _prepare(hosts)
        for name in NAMES:
            hosts.boot(name)
        yield hosts
    finally:
        hosts.close()
        if made:
            with contextlib.suppress(OSError):
                separation.rmdir()


def _prepare(hosts: SshHosts) -> None:
    for key in ("host_key", "key"):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(hosts.root / key)])
    public = (hosts.root / "host_key.pub").read_text()
    (hosts.root / "known_hosts").write_text(f"nodes {public}")
    clients = ""
    for name, port in hosts.ports.items():
        (hosts.root / f"{name}.conf").write_text(_CONFIG.format(root=hosts.root, name=name, port=port))
        clients += _CLIENT.format(name=name, port=port)
    clients += _CLIENTS.format(root=hosts.root, user=getpass.getuser())
    (hosts.root / "ssh_config").write_text(clients)


def _run(argv: Sequence[str]) -> None:
    subprocess.run(argv, check=True, timeout=60, stdin=subprocess.DEVNULL)
