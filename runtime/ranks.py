"""The process group of one attempt, small sums over all ranks, and the board on which checkpoints are agreed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # as torch.distributed re-exports them

from dtrain.cluster.workerenv import WorkerEnv

# Peers die loudly (their connections close) and the agents end what hangs; this is only the last resort.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
JOIN_TIMEOUT = timedelta(minutes=5)


class Board:
    """A key-value board of this attempt, over a connection of its own so that a background thread may wait on it."""

    def __init__(self, store: Store) -> None:
        # Any: the stubs of torch 2.13 know neither clone() nor bytes
        self._store: Any = cast(Any, store).clone()

    def set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def wait(self, key: str, timeout_s: float) -> bytes:
        """Raises dist.DistStoreError when the time is up. The key is gone afterwards: a long run saves often."""
        self._store.wait([key], timedelta(seconds=timeout_s))
        value = bytes(self._store.get(key))
        self._store.delete_key(key)
        return value


class Ranks:
    def __init__(self, env: WorkerEnv, device: torch.device, store: TCPStore) -> None:
        self.global_rank = env.global_rank
        self.world_size = env.world_size
        self.device = device
        self.board = Board(store)

    def all_reduce(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64 on CPU, the same bits on every rank. Collective."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, said: bytes) -> list[bytes]:
        """What each rank says, in their order, on rank 0; nothing elsewhere. Collective."""
        if self.world_size == 1:
            return [said]
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.global_rank] = len(said)
        dist.all_reduce(sizes)
        padded = torch.frombuffer(bytearray(said.ljust(max(1, int(sizes.max())), b"\0")), dtype=torch.uint8)
        if self.global_rank != 0:
            dist.gather(padded)
            return []
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.gather(padded, parts)
        return [bytes(part[:size].tolist()) for part, size in zip(parts, sizes.tolist(), strict=True)]


@contextlib.contextmanager
def process_group(env: WorkerEnv) -> Iterator[Ranks]:
    """Joins the attempt's process group: gloo for CPU tensors, nccl for CUDA ones. Leaves it at the end, but not after
    an exception: peers may be stuck, and this process is about to go."""
    device = torch.device(env.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if env.master_addr.startswith("127."):  # on loopback gloo must not look the host name up
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = TCPStore(
        env.master_addr,
        env.master_port,
        env.world_size,
        is_master=env.global_rank == 0,
        timeout=JOIN_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=env.store_fd if env.store_fd >= 0 and env.global_rank == 0 else None,
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(f"attempt-{env.attempt}", store),
        rank=env.global_rank,
        world_size=env.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    yield Ranks(env, device, store)
    dist.barrier()  # rank 0 holds the store: nobody may still need it when it goes
    dist.destroy_process_group()
