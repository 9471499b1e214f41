"""The staging buffer: where a save's bytes wait for the background, so that training may go on.

Allocated once and touched at once (fresh pages cost six times a warm copy), grown only when a save needs more.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size_bytes: int, *, pinned: bool) -> None:
        """At least `size_bytes`. `pinned` memory takes copies from a GPU at full speed."""
        if self._buffer.numel() < size_bytes or (pinned and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._buffer.fill_(0)

    def copy_in(self, begin: int, source: Tensor) -> None:
        """`source`, row-major, to byte `begin`, a multiple of its item size. From a GPU the copy is only begun."""
        target = self._buffer[begin : begin + source.numel() * source.element_size()]
        target.view(source.dtype).view(source.shape).copy_(source, non_blocking=self._buffer.is_pinned())

    def view(self, begin: int, end: int) -> memoryview:
        return self._buffer.numpy().data[begin:end]
