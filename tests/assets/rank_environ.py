"""What a forked rank is started with: environment variables, as if its interpreter had them, and its place."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dtrain.cluster.workerenv import WorkerEnv


def adopt(environ: Mapping[str, str]) -> None:
    os.environ.update(environ)
    sys.path[:0] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))


@contextlib.contextmanager
def adopted(environ: Mapping[str, str]) -> Iterator[None]:
    """For a while."""
    before, path = dict(os.environ), list(sys.path)
    adopt(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path[:] = path


def place_of(rank: int, world_size: int, listener: socket.socket, **more: Any) -> WorkerEnv:
    """Of a CPU rank among others on this machine, without an agent. `listener`: rank 0 answers on it."""
    given: dict[str, Any] = {"run_dir": "", "attempt": 1, "name": "case", "job_id": "job", "device": "cpu", **more}
    return WorkerEnv(
        global_rank=rank,
        local_rank=rank,
        node_rank=0,
        world_size=world_size,
        local_world_size=world_size,
        num_nodes=1,
        master_addr="127.0.0.1",
        master_port=listener.getsockname()[1],
        store_fd=listener.fileno() if rank == 0 else -1,
        **given,
    )
