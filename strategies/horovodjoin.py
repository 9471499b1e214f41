"""How the ranks of an attempt join Horovod: its rendezvous server for as long as that takes, and what it reads.

The server is a thread of global rank 0, which tells the others its port through the process group that they share
already: so no two attempts can meet, agents know nothing of Horovod, and no process or port is left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dtrain.cluster.errors import UsageError
from dtrain.cluster.interfaces import list_interfaces
from dtrain.strategies.caps import CAPS
from dtrain.strategies.protocol import Topology

if TYPE_CHECKING:
    from http.server import HTTPServer

# As for the process group: peers die loudly, the agents end what hangs, this is the last resort.
TIMEOUT_S = 3600
_ADDRESS_BYTES = 64


def join(topology: Topology, *, num_tensors: int) -> Any:
    """horovod.torch, initialized. Collective. Raises UsageError where it is not installed or fits another torch."""
    hvd = import_horovod()
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    with _rendezvous(interface, topology.global_rank) as (address, port):
        os.environ.update(_identity(topology, address, port, interface))
        for name, value in _settings(num_tensors).items():
            os.environ.setdefault(name, value)
        hvd.init()
    # Its own exit handler would wait for ranks that are stuck or gone.
    atexit.unregister(hvd.shutdown)
    return hvd


def import_horovod() -> Any:
    """Raises UsageError where it is not installed, or not for this torch."""
    (package,) = CAPS["horovod"].needs
    try:
        import horovod.torch as hvd

        importlib.import_module("horovod.torch.mpi_lib_v2")  # compiled; horovod.torch only mentions its absence
    except ImportError as error:
        if error.name == "horovod":
            raise UsageError(f"strategy: horovod is not installed here. {package.install}") from None
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"strategy: the installed Horovod does not fit torch {torch.__version__}: {reason}. {package.install}"
        ) from error
    return hvd


def _identity(topology: Topology, address: str, port: int, interface: str) -> dict[str, str]:
    """What horovodrun would set. Ranks of a node are neighbours."""
    per_node = topology.world_size // topology.nodes
    node, local_rank = divmod(topology.global_rank, per_node)
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_HOSTNAME": f"node-{node}",
        "HOROVOD_RANK": str(topology.global_rank),
        "HOROVOD_SIZE": str(topology.world_size),
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(per_node),
        "HOROVOD_CROSS_RANK": str(node),
        "HOROVOD_CROSS_SIZE": str(topology.nodes),
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": interface,
    }


def _settings(num_tensors: int) -> dict[str, str]:
    """Those that somebody may have set otherwise."""
    return {
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(TIMEOUT_S),
        # Groups are sums of their own, never two in one by chance: the same bits each time.
        "HOROVOD_DISABLE_GROUP_FUSION": "1",
        "HOROVOD_CACHE_CAPACITY": str(max(1024, 2 * num_tensors)),
    }


@contextlib.contextmanager
def _rendezvous(interface: str, global_rank: int) -> Iterator[tuple[str, int]]:
    """(address, port) of the server, which lives until all ranks are through. Collective."""
    server = _serve(_address_of(interface)) if global_rank == 0 else None
    try:
        yield _told(server.server_address[:2] if server else None)  # type: ignore[arg-type]
        dist.barrier()
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()


def _told(place: tuple[str, int] | None) -> tuple[str, int]:
    """What rank 0 says, on every rank."""
    said = torch.zeros(_ADDRESS_BYTES, dtype=torch.uint8)
    if place is not None:
        raw = f"{place[0]} {place[1]}".encode()
        said[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    dist.broadcast(said, src=0)
    address, port = bytes(said.tolist()).rstrip(b"\0").decode().split()
    return address, int(port)


def _address_of(interface: str) -> str:
    """Where gloo is bound to no interface, it takes the one that the host's name means."""
    for found in list_interfaces():
        if found.name == interface:
            return found.address
    return socket.gethostbyname(socket.gethostname())


def _serve(address: str) -> HTTPServer:
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    class Server(RendezvousHTTPServer):  # type: ignore[misc]
        daemon_threads = True
        request_queue_size = 1024  # all ranks may come at once

        def server_bind(self) -> None:
            """Without the look-up of the host's name, which can take seconds; and on one interface."""
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = self.server_address[:2]

    server: HTTPServer = Server((address, 0), RendezvousHandler, 0)
    threading.Thread(target=server.serve_forever, name="horovod rendezvous", daemon=True).start()
    return server
