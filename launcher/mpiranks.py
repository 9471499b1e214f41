"""Who is where among the ranks of an MPI job, and one text from the first of them to all. mpi4py is used for no more,
and left before anything is trained.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dtrain.cluster.devices import count_gpus
from dtrain.cluster.errors import UsageError

_POLL_S = 0.05  # MPI's own waiting burns a core, which the first rank's checks need
_INSTALL = "pip install 'dtrain[mpi]', or mpi4py built with your cluster's MPI"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What a rank says of itself."""

    host: str
    cores: tuple[int, ...]
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """The ranks' machines, in the order of their first ranks. `leaders`: that first rank of each."""

    hosts: tuple[str, ...]
    leaders: tuple[int, ...]
    procs_per_node: int
    cores: tuple[tuple[int, ...], ...]  # of each machine, those of all its ranks
    gpus_per_node: int


def arrange(members: Sequence[Member]) -> Machines:
    """`members`: of all ranks, in their order. Pure. Raises UsageError where the machines have different shares."""
    counts = Counter(member.host for member in members)
    if len(set(counts.values())) > 1:
        shares = ", ".join(f"{count} on {host}" for host, count in counts.items())
        raise UsageError(
            f"{len(members)} ranks: {shares}. Every machine must have the same number of them: choose -n, or place "
            "them by node (Open MPI: --map-by ppr:N:node, MPICH: -ppn N, srun: --ntasks-per-node=N)."
        )
    hosts = tuple(counts)
    leaders = tuple(next(rank for rank, member in enumerate(members) if member.host == host) for host in hosts)
    cores = tuple(
        tuple(sorted({core for member in members if member.host == host for core in member.cores})) for host in hosts
    )
    return Machines(
        hosts=hosts, leaders=leaders, procs_per_node=counts[hosts[0]], cores=cores,
        gpus_per_node=min(member.gpus for member in members),
    )  # fmt: skip


class Ranks:
    """This process among the ranks of its MPI job. Close it before anything else is started."""

    def __init__(self) -> None:
        """Joins. Raises UsageError without mpi4py, or where its MPI library is none that can start here."""
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no libmpi
            raise UsageError(f"dtrain run: asks mpi4py which rank this is, and {error}. {_INSTALL}.") from error
        self._mpi: Any = MPI
        self._comm: Any = MPI.COMM_WORLD
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()

    def machines(self) -> Machines:
        """Collective. Raises UsageError, the same on every rank."""
        cores = tuple(sorted(os.sched_getaffinity(0)))
        mine = Member(host=socket.gethostname(), cores=cores, gpus=count_gpus())
        return arrange(self._comm.allgather(mine))

    def tell(self, text: str) -> None:
        """To all others, who hear it. By the first rank only."""
        for request in [self._comm.isend(text, dest=rank) for rank in range(1, self.size)]:
            request.wait()

    def hear(self) -> str:
        """What the first rank tells."""
        request = self._comm.irecv(source=0)
        while True:
            done, text = request.test()
            if done:
                return str(text)
            time.sleep(_POLL_S)

    def close(self) -> None:
        self._mpi.Finalize()
