"""The section `cluster.ssh`: the machines that ssh reaches. What is started there is cluster/ssh.py's."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtrain.cluster.hostfile import Host, parse_hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class SshConfig:
    hosts: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "machines as ssh knows them, like node1, me@node2, or node1 slots=8; the first `cluster.nodes` are "
            "used, and one more stands in for one that is lost"
        },
    )
    hostfile: str = field(
        default="", metadata={"doc": "a file that lists them, one a line, as Open MPI and DeepSpeed read it"}
    )
    options: tuple[str, ...] = field(
        default=(), metadata={"doc": 'more words for ssh, like ["-p", "2222"] or ["-i", "~/.ssh/cluster"]'}
    )

    def read_hosts(self) -> list[Host]:
        """Raises ValueError with what to do, for wrong lines, a file that can't be read, and two lists."""
        if self.hosts and self.hostfile:
            raise ValueError("has both hosts and hostfile. Leave one out.")
        if not self.hostfile:
            return parse_hosts(self.hosts, "hosts")
        try:
            with open(self.hostfile, encoding="utf-8") as file:
                return parse_hosts(file, self.hostfile)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.hostfile} can't be read: {error}") from error


def slots_of(hosts: list[Host]) -> int | None:
    """Processes on each of them; None where no line says. Raises ValueError where they differ."""
    found = {host.slots for host in hosts}
    if len(found) > 1:
        few, many = sorted(hosts, key=lambda host: host.slots or 0)[:: len(hosts) - 1]
        raise ValueError(
            f"{few.name} has {few.slots or 'no'} slots and {many.name} {many.slots}, but every node runs as many "
            "processes. Give them the same, or set cluster.procs_per_node."
        )
    return found.pop() if found else None
