"""Buffers that a model changes while it trains (running statistics, codebooks) see each rank's own samples only. After
a step all ranks take rank 0's, as torch's DistributedDataParallel does: the state that is saved is one state. In a
pipeline each stage does so for itself.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from dtrain.runtime.ranks import Ranks
from dtrain.strategies.absent import is_absent
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.state import buffer_places


class SharedBuffers:
    """Costs nothing where a model has no persistent buffers, one small sum a step where none has changed."""

    def __init__(self, model: nn.Module, ranks: Ranks, degrees: Degrees) -> None:
        """Collective."""
        self._first, self._group = _stage(ranks.global_rank, degrees)
        alone = ranks.world_size == degrees.pipeline
        places = [] if alone else buffer_places(model).values()
        self._places = [(module, name) for module, name in places if not is_absent(getattr(module, name))]
        self._seen = self._look()

    def share(self) -> None:
        """Collective."""
        if not self._places:
            return
        now = self._look()
        # Modules, not tensors: a batch norm's kernel writes its statistics uncounted, the module counts its batches.
        touched = {
            module
            for (module, _), (tensor, version), (before, old) in zip(self._places, now, self._seen, strict=True)
            if tensor is not before or version != old
        }
        changed = torch.tensor([int(module in touched) for module, _ in self._places])
        torch.distributed.all_reduce(changed, group=self._group)
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for (tensor, _), ranks in zip(now, changed.tolist(), strict=True):
            if ranks:
                alike[tensor.dtype, tensor.device].append(tensor.detach())
        for tensors in alike.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            torch.distributed.broadcast(flat, self._first, group=self._group)
            for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))
        self._seen = self._look()

    def _look(self) -> list[tuple[Tensor, int]]:
        """The tensors, held so that an object is not taken for its successor, and how often each was written to."""
        tensors = [getattr(module, name) for module, name in self._places]
        return [(tensor, tensor._version) for tensor in tensors]


def _stage(global_rank: int, degrees: Degrees) -> tuple[int, torch.distributed.ProcessGroup | None]:
    """The first of the ranks that hold the same buffers, and their group; None: all. Collective."""
    if degrees.pipeline == 1:
        return 0, None
    size = degrees.world_size // degrees.pipeline
    stages = [list(range(first, first + size)) for first in range(0, degrees.world_size, size)]
    groups = [torch.distributed.new_group(ranks) for ranks in stages]
    mine = degrees.coordinate(global_rank)["pipeline"]
    return stages[mine][0], groups[mine]
