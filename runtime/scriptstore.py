"""The store behind a script's MASTER_ADDR and MASTER_PORT. Rank 0 serves it from the socket that its agent has held, so
that nobody can take the port, and for as long as another rank may need it. Each attempt has its own.

The script's init_process_group is told by TORCHELASTIC_USE_AGENT_STORE to be a client of it on every rank, rank 0
included, as under torchrun.
"""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore  # as torch.distributed re-exports it

from dtrain.cluster.workerenv import WorkerEnv

_LEFT = "dtrain/left"
_POLL_S = 0.02
_TIMEOUT = timedelta(seconds=30)


class ScriptStore:
    """This rank's side of it."""

    def __init__(self, env: WorkerEnv) -> None:
        self._env = env
        self._server = self._open(serve=True) if env.global_rank == 0 else None

    def wait_for_all(self) -> None:
        """This rank is done with the store. Rank 0 waits for the others: should one of them never come, their agents
        see why and end us."""
        if self._server is None:
            with contextlib.suppress(RuntimeError):  # rank 0 is gone already, which its own end tells
                self._open(serve=False).add(_LEFT, 1)
            return
        while self._server.add(_LEFT, 0) < self._env.world_size - 1:
            time.sleep(_POLL_S)

    def _open(self, *, serve: bool) -> TCPStore:
        env = self._env
        return TCPStore(
            env.master_addr,
            env.master_port,
            env.world_size,
            is_master=serve,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=env.store_fd if serve and env.store_fd >= 0 else None,
        )
