"""Buffers that a model changes while it trains (running statistics, codebooks) see each rank's own samples only. After
a step all ranks take rank 0's, as torch's DistributedDataParallel does: the state that is saved is one state.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from dtrain.runtime.ranks import Ranks
from dtrain.strategies.state import persistent_buffers


class SharedBuffers:
    """Costs nothing where a model has no persistent buffers, one small sum a step where none has changed."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._ranks = ranks
        kept = {name for name, _ in persistent_buffers(model)} if ranks.world_size > 1 else set()
        self._places = [
            (module, name)
            for prefix, module in model.named_modules()
            for name, _ in module.named_buffers(recurse=False)
            if f"{prefix}.{name}".removeprefix(".") in kept
        ]
        self._seen = self._look()

    def share(self) -> None:
        """Collective."""
        if not self._places:
            return
        now = self._look()
        touched = {
            module
            for (module, _), (tensor, version), (before, old) in zip(self._places, now, self._seen, strict=True)
            if tensor is not before or version != old or _is_running(module)
        }
        changed = [float(module in touched) for module, _ in self._places]
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for (tensor, _), ranks in zip(now, self._ranks.all_reduce(changed), strict=True):
            if ranks:
                alike[tensor.dtype, tensor.device].append(tensor.detach())
        for tensors in alike.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            torch.distributed.broadcast(flat, 0)
            for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))
        self._seen = self._look()

    def _look(self) -> list[tuple[Tensor, int]]:
        """The tensors, held so that an object is not taken for its successor, and how often each was written to."""
        tensors = [getattr(module, name) for module, name in self._places]
        return [(tensor, tensor._version) for tensor in tensors]


def _is_running(module: nn.Module) -> bool:
    """Their kernels write running statistics without counting it as a write."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats and module.training
