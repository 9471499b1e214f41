"""Which bytes of a stored box hold a part of it, block by block, and the pieces in which they are read.

All byte positions count from the beginning of the stored box, where its checksum blocks begin too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from dtrain.runtime.checkpoint.index import BLOCK_BYTES
from dtrain.strategies.boxes import Box

PIECE_BYTES = 16 * 1024 * 1024  # what one read buffers at most, a block or two aside


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a row-major array, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def byte_span(part: Box, stored: Box, item: int) -> tuple[int, int]:
    """[begin, end) from the first element of `part` to the last, in a row-major `stored`. `part` is not empty."""
    first = last = 0
    for offset, size, base, stride in zip(
        part.offsets, part.shape, stored.offsets, strides_of(stored.shape), strict=True
    ):
        first += (offset - base) * stride
        last += (offset - base + size - 1) * stride
    return first * item, (last + 1) * item


def pieces(part: Box, stored: Box, item: int, limit: int = PIECE_BYTES) -> Iterator[Box]:
    """Cuts `part` so that each piece spans at most `limit` bytes of the stored box (one element at least)."""
    begin, end = byte_span(part, stored, item)
    if end - begin <= limit:
        yield part
        return
    dim = next(d for d, size in enumerate(part.shape) if size > 1)
    stride = strides_of(stored.shape)[dim] * item
    step = max(1, limit // stride)
    for at in range(0, part.shape[dim], step):
        size = min(step, part.shape[dim] - at)
        cut = Box(_replaced(part.offsets, dim, part.offsets[dim] + at), _replaced(part.shape, dim, size))
        yield from pieces(cut, stored, item, limit) if size == 1 else (cut,)


def needed_blocks(part: Box, stored: Box, item: int) -> list[tuple[int, int]]:
    """Runs [first, last) of the checksum blocks that hold an element of `part`, in order."""
    runs: list[tuple[int, int]] = []
    for begin, end in byte_runs(part, stored, item):
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
        else:
            runs.append((first, last))
    return runs


def byte_runs(part: Box, stored: Box, item: int) -> Iterator[tuple[int, int]]:
    """The contiguous byte ranges of `part`, in order; rows closer together than a block count as one."""
    strides = [stride * item for stride in strides_of(stored.shape)]
    dims = len(part.shape)
    # Dims from `inner` on make one run: below a block of bytes gaps don't matter, whole blocks are read anyway.
    inner = dims
    while inner > 0 and (strides[inner - 1] <= BLOCK_BYTES or part.shape[inner - 1] == 1):
        inner -= 1
    begin, _ = byte_span(part, stored, item)
    length = item + sum((part.shape[dim] - 1) * strides[dim] for dim in range(inner, dims))
    for cell in product(*(range(part.shape[dim]) for dim in range(inner))):
        at = begin + sum(position * strides[dim] for dim, position in enumerate(cell))
        yield at, at + length


def _replaced(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])
