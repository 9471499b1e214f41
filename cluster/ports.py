"""Listening sockets on a port that is free, out of `cluster.port_range` where a firewall lets only some through."""

from __future__ import annotations

import errno
import socket

from dtrain.cluster.errors import UsageError

PortRange = tuple[int, int]  # first and last
BACKLOG = 4096  # all nodes, or all ranks, of a large job may come at once


def listening_socket(address: str, ports: PortRange | None) -> socket.socket:
    """Listens on `address`; nobody else can take the port. Raises UsageError when all ports of the range are taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in [0] if ports is None else range(ports[0], ports[1] + 1):
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
