"""Box arithmetic: which part of a globally named tensor lies where. Torch-free and pure.

A Box is a hyper-rectangle of a global tensor. A Layout says how a tensor is cut into a grid of parts and which ranks
hold a copy of each part; Patches say the same box by box, where no grid describes it. Both are the same on every rank,
so that saves are planned without talking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product


@dataclass(frozen=True, slots=True)
class Box:
    """offsets and shape, one entry a dim. A 0-dim tensor is Box((), ())."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The common part in global coordinates; None where it is empty."""
        offsets, shape = [], []
        for begin_a, size_a, begin_b, size_b in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True):
            begin = max(begin_a, begin_b)
            size = min(begin_a + size_a, begin_b + size_b) - begin
            if size <= 0:
                return None
            offsets.append(begin)
            shape.append(size)
        return Box(tuple(offsets), tuple(shape))

    def relative_to(self, outer: Box) -> tuple[slice, ...]:
        """Slices that select this box from an array holding `outer`."""
        return tuple(
            slice(begin - base, begin - base + size)
            for begin, size, base in zip(self.offsets, self.shape, outer.offsets, strict=True)
        )


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def grid_boxes(shape: tuple[int, ...], parts: tuple[int, ...]) -> list[Box]:
    """The boxes of a grid in row-major order of parts, each dim cut as torch.chunk cuts: ceil-sized, the last ones
    smaller or empty."""
    axes = []
    for size, num_parts in zip(shape, parts, strict=True):
        step = -(-size // num_parts)
        axes.append([(min(i * step, size), max(0, min(step, size - i * step))) for i in range(num_parts)])
    return [Box(tuple(o for o, _ in cell), tuple(s for _, s in cell)) for cell in product(*axes)]


def flat_boxes(shape: tuple[int, ...], begin: int, end: int) -> list[Box]:
    """Elements [begin, end) of a tensor laid out row by row, as boxes in the order of the elements: at most two a dim,
    less one. Cut off where the tensor ends, so that padding may be asked for."""
    end = min(end, math.prod(shape))
    if begin >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # the whole rows in between
    if first > last:  # inside one row
        return _in_row(shape, last, begin - last * row, end - last * row)
    found = _in_row(shape, first - 1, begin - (first - 1) * row, row) if begin < first * row else []
    if first < last:
        found.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return found + (_in_row(shape, last, 0, end - last * row) if end > last * row else [])


def _in_row(shape: tuple[int, ...], row: int, begin: int, end: int) -> list[Box]:
    return [Box((row, *box.offsets), (1, *box.shape)) for box in flat_boxes(shape[1:], begin, end)]


@dataclass(frozen=True, slots=True)
class Layout:
    """`parts` a dim (ceil-chunked); `owners[i]`: the global ranks that hold a copy of part i (row-major order)."""

    parts: tuple[int, ...]
    owners: tuple[tuple[int, ...], ...]

    def cells(self, shape: tuple[int, ...]) -> Iterable[tuple[Box, tuple[int, ...]]]:
        """Each part with its owners; boxes may be empty."""
        return zip(grid_boxes(shape, self.parts), self.owners, strict=True)

    @property
    def holders(self) -> tuple[int, ...] | None:
        """The ranks that hold all of it; None where it is cut."""
        return self.owners[0] if len(self.owners) == 1 else None


@dataclass(frozen=True, slots=True)
class Patches:
    """Boxes one by one, each with the global ranks that hold a copy of it. They cover the tensor, once; empty ones are
    left out."""

    boxes: tuple[tuple[Box, tuple[int, ...]], ...]

    def cells(self, shape: tuple[int, ...]) -> Iterable[tuple[Box, tuple[int, ...]]]:
        return self.boxes

    @property
    def holders(self) -> tuple[int, ...] | None:
        return None


@cache  # one object for all tensors alike: planning remembers what it knows of a layout
def replicated(num_dims: int, world_size: int) -> Layout:
    return Layout((1,) * num_dims, (tuple(range(world_size)),))


@cache
def sharded(num_dims: int, dim: int, ranks: tuple[int, ...]) -> Layout:
    return Layout(tuple(len(ranks) if d == dim else 1 for d in range(num_dims)), tuple((rank,) for rank in ranks))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One globally named tensor, equal on every rank. `dtype` in safetensors' names: F32, BF16, I64, ...

    Names: `model.<fully qualified name>` for parameters and buffers, `optim.<fully qualified name>.<state key>` for
    optimizer state. A tied parameter appears once, under the first of its names.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout | Patches
