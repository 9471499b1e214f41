"""Which elements of a tensor are kept for a comparison: all of a small one, some of a large one, spread evenly. The
same whatever the layout, so that the parts that ranks hold can be laid side by side. Torch-free."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dtrain.strategies.boxes import Box

LIMIT = 1 << 14  # elements of one tensor

Ints = NDArray[np.int64]


@lru_cache(maxsize=256)
def chosen(shape: tuple[int, ...]) -> Ints:
    """Flat row-major indices, rising: one at random out of each of `LIMIT` equal stretches."""
    size = math.prod(shape)
    if size <= LIMIT:
        return np.arange(size)
    bounds = np.arange(LIMIT + 1) * size // LIMIT
    random = np.random.default_rng(size)
    return bounds[:-1] + (random.random(LIMIT) * np.diff(bounds)).astype(np.int64)


@lru_cache(maxsize=256)
def inside(shape: tuple[int, ...], box: Box) -> tuple[Ints, Ints]:
    """(which of `chosen` lie in the box, by number; where in the box, flat): a box holds only its own elements."""
    flat = chosen(shape)
    if not shape or box.num_elements == 0:
        none = np.arange(0)
        return (none, none) if box.num_elements == 0 else (flat, flat)
    places = np.stack(np.unravel_index(flat, shape)) - np.array(box.offsets)[:, None]
    numbers = np.flatnonzero(np.logical_and(places >= 0, places < np.array(box.shape)[:, None]).all(axis=0))
    return numbers, np.asarray(np.ravel_multi_index(tuple(places[:, numbers]), box.shape), dtype=np.int64)
