"""Text between the ranks of a group, as CPU tensors: nothing is pickled."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def broadcast_text(text: str, source: int, group: dist.ProcessGroup | None = None) -> str:
    """What the global rank `source` says, on every rank of `group`, or of the job. Collective."""
    size = torch.tensor(len(text.encode()))
    dist.broadcast(size, source, group=group)
    data = _as_bytes(text, int(size)) if dist.get_rank() == source else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return data.numpy().tobytes().decode()


def gather_texts(text: str, group: dist.ProcessGroup) -> list[str]:
    """What each rank of `group` says, in its order, on every one. Collective."""
    size = torch.tensor(len(text.encode()))
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    room = int(max(sizes))
    parts = [torch.empty(room, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(parts, _as_bytes(text, room), group=group)
    return [part[: int(size)].numpy().tobytes().decode() for part, size in zip(parts, sizes, strict=True)]


def _as_bytes(text: str, size: int) -> Tensor:
    return torch.frombuffer(bytearray(text.encode().ljust(size, b"\0")), dtype=torch.uint8)
