"""Listening sockets on a port that is free, out of `cluster.port_range` where a firewall lets only some through."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from dtrain.cluster.errors import UsageError

PortRange = tuple[int, int]  # first and last
BACKLOG = 4096  # all nodes, or all ranks, of a large job may come at once
_FIRST = 20_000  # below are the ports that services are known by
_ENOUGH = 256
_LAST = 65_535


def ports_of_no_connection(ephemeral: str | None = None) -> PortRange | None:
    """Ports that this machine gives to no outgoing connection, so that none sits on one by chance; None where too few
    are left. `ephemeral` is the content of /proc/sys/net/ipv4/ip_local_port_range."""
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text() if ephemeral is None else ephemeral
        low, high = map(int, text.split())
    except (OSError, ValueError):
        return None
    candidates = [(_FIRST, low - 1), (high + 1, _LAST)]
    return next(((first, last) for first, last in candidates if last - first >= _ENOUGH), None)


def listening_socket(address: str, ports: PortRange | None) -> socket.socket:
    """Listens on `address`; nobody else can take the port. The search begins anywhere in the range, so that jobs that
    share a node do not all try the same ones. Raises UsageError when all ports of the range are taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in [0] if ports is None else _from_anywhere(ports):
        server = socket.socket(family)
        try:
            # What a finished attempt has left in TIME_WAIT is no obstacle; a listener is, and listen() then says so.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((address, port))
            server.listen(BACKLOG)
            return server
        except OSError as error:
            server.close()
            if error.errno != errno.EADDRINUSE or ports is None:
                raise
        except BaseException:
            server.close()
            raise
    assert ports is not None
    raise UsageError(
        f"cluster.port_range: all {ports[1] - ports[0] + 1} ports {ports[0]} to {ports[1]} of {address} are taken. "
        "Give a wider range, or end what uses them."
    )


def _from_anywhere(ports: PortRange) -> list[int]:
    listed = list(range(ports[0], ports[1] + 1))
    start = random.randrange(len(listed))
    return listed[start:] + listed[:start]
