"""Which cores each worker gets: equal slices of those that its node may use, so that workers do not chase each other
over the machine and their memory stays near. Pure; runtime/childproc.py binds, the agent prints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

# A person who sets one of these has plans of their own.
USERS_OWN = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
Shape = tuple[int, int]
ONE_MACHINE = "local"  # the back end whose nodes share the cores of one machine


def slice_of_cores(
    cores: Collection[int], environ: Mapping[str, str], *, backend: str, node_rank: int, local_rank: int, shape: Shape
) -> tuple[int, ...]:
    """The cores of one worker out of those that its node may use; () where it is not to be bound.

    `shape`: (nodes, workers a node). Slices are equal, so that no rank is waited for; none is made that has fewer cores
    than the worker has threads.
    """
    nodes, workers = shape
    index, count = (
        (node_rank * workers + local_rank, nodes * workers) if backend == ONE_MACHINE else (local_rank, workers)
    )
    size = len(cores) // count
    threads = environ.get("OMP_NUM_THREADS", "1").split(",")[0]
    if count < 2 or size < (int(threads) if threads.isdigit() else 1) or any(name in environ for name in USERS_OWN):
        return ()
    return tuple(sorted(cores)[index * size : (index + 1) * size])


def describe(cores: Sequence[int]) -> str:
    """Like `0-3,8`; the cores ascend."""
    breaks = [position for position, (a, b) in enumerate(pairwise(cores), start=1) if b != a + 1]
    runs = [cores[start:end] for start, end in pairwise([0, *breaks, len(cores)])]
    return ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
