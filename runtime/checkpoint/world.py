"""The ranks that a script's own checkpoints are saved and loaded by: its default process group, or this process alone.
What they tell each other is JSON; big data goes other ways."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    _get_default_store,  # no public name gives the store of init_process_group
)

from dtrain.cluster.errors import CheckpointError, UsageError
from dtrain.runtime.checkpoint.board import Board, LocalBoard
from dtrain.runtime.ranks import Board as StoreBoard


@dataclass(frozen=True, slots=True)
class World:
    rank: int
    size: int
    group: Any  # a process group that carries CPU tensors; None: the default one does
    board: Board

    def say(self, mine: Any) -> list[Any]:
        """What every rank says, by rank. Collective."""
        if self.size == 1:
            return [mine]
        words = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([words.numel()]), group=self.group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: words.numel()] = words
        everybody = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(everybody, padded, group=self.group)
        return [
            json.loads(said[: int(length)].numpy().tobytes()) for said, length in zip(everybody, lengths, strict=True)
        ]

    def from_first(self, ask: Callable[[], Any]) -> Any:
        """What `ask` gives on rank 0, which alone is asked. Raises CheckpointError on every rank. Collective."""
        answer: Any = None
        if self.rank == 0:
            try:
                answer = {"answer": ask()}
            except Exception as error:
                answer = {"error": str(error)}
                failure = error
        told = self.say(answer)[0]
        if "error" in told:
            raise failure if self.rank == 0 else CheckpointError(f"rank 0: {told['error']}")
        return told["answer"]

    def agree(self, error: Exception | None) -> None:
        """Raises on every rank where one of them has failed. Collective."""
        told = self.say(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, words in enumerate(told):
            if words is not None:
                raise CheckpointError(f"rank {rank}: {words}")


def current_world() -> World:
    """Raises UsageError where other ranks were started and nobody has joined them. Collective when it is new."""
    if dist.is_available() and dist.is_initialized():
        return _world_of(dist.group.WORLD)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"checkpoint: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this process is in no process group. "
            "Call torch.distributed.init_process_group() first, on every rank"
        )
    return _ALONE


_ALONE = World(0, 1, None, LocalBoard())


_newest: tuple[weakref.ref[Any], World] | None = None  # of the default group that is not kept alive by this


def _world_of(default: Any) -> World:
    global _newest
    if _newest is None or _newest[0]() is not default:
        carries_cpu = dist.get_backend() != "nccl" or "cpu:" in dist.get_backend_config()
        group = None if carries_cpu else dist.new_group(backend="gloo")
        board = StoreBoard(_get_default_store())
        _newest = weakref.ref(default), World(dist.get_rank(), dist.get_world_size(), group, board)
    return _newest[1]
