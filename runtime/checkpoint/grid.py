"""Single parts of a grid, found by arithmetic: what grid_boxes() of strategies.boxes lists, without making the list."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

from dtrain.strategies.boxes import Box


def part_box(shape: tuple[int, ...], parts: tuple[int, ...], index: int) -> Box:
    """grid_boxes(shape, parts)[index]."""
    offsets, sizes = [], []
    for size, num_parts in zip(reversed(shape), reversed(parts), strict=True):
        index, cell = divmod(index, num_parts)
        step = -(-size // num_parts)
        begin = min(cell * step, size)
        offsets.append(begin)
        sizes.append(min(step, size - begin))
    return Box(tuple(reversed(offsets)), tuple(reversed(sizes)))


def parts_within(shape: tuple[int, ...], parts: tuple[int, ...], box: Box) -> Iterator[int]:
    """Indices of the parts that share an element with `box`, in order."""
    if box.num_elements == 0:
        return
    axes = []
    for size, num_parts, begin, length in zip(shape, parts, box.offsets, box.shape, strict=True):
        step = -(-size // num_parts)
        axes.append(range(begin // step, (begin + length - 1) // step + 1))
    strides = [math.prod(parts[dim + 1 :]) for dim in range(len(parts))]
    for cell in product(*axes):
        yield sum(position * stride for position, stride in zip(cell, strides, strict=True))


def covers(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """Whether the boxes cover every element of a tensor exactly once."""
    boxes = [box for box in boxes if box.num_elements]
    inside = all(
        begin >= 0 and begin + length <= size
        for box in boxes
        for begin, length, size in zip(box.offsets, box.shape, shape, strict=True)
    )
    return inside and sum(box.num_elements for box in boxes) == math.prod(shape) and not _overlap(boxes)


def _overlap(boxes: list[Box]) -> bool:
    """Sweeps along the dim on which the boxes differ most, so that slices of one dim cost n log n."""
    if len(boxes) < 2 or not boxes[0].shape:
        return len(boxes) > 1
    dim = max(range(len(boxes[0].shape)), key=lambda d: len({box.offsets[d] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        active = [other for other in active if other.offsets[dim] + other.shape[dim] > box.offsets[dim]]
        if any(other.intersect(box) for other in active):
            return True
        active.append(box)
    return False
