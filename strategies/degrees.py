"""How many ways a job's ranks are split along each axis, and where a rank stands on them. Torch-free and pure.

Axes from the outermost in: ranks that differ only along the last one are neighbours, inside a node where they fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

Axis = Literal["pipeline", "replicate", "shard", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)
DATA_AXES: tuple[Axis, ...] = ("replicate", "shard")  # ranks that differ along these see different samples


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRank:
    """A rank among those that share the samples of a step. Ranks that hold parts of one copy of the model work on the
    same samples: they have the same rank here, and one of them counts."""

    rank: int
    world_size: int
    counts: bool  # it adds its losses and counts to sums over all ranks: of a pipeline the last stage, which has them


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> dict[Axis, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def data(self) -> int:
        """How many ranks, or groups of ranks, share the samples of a step."""
        return self.replicate * self.shard

    def coordinate(self, rank: int) -> dict[Axis, int]:
        """Where a global rank stands on each axis."""
        place: dict[Axis, int] = {}
        for axis, size in reversed(self.sizes.items()):
            rank, place[axis] = divmod(rank, size)
        return place

    def rank_at(self, place: dict[Axis, int]) -> int:
        """The global rank that stands there: the inverse of coordinate()."""
        rank = 0
        for axis, size in self.sizes.items():
            rank = rank * size + place[axis]
        return rank

    def data_rank(self, rank: int) -> DataRank:
        """A global rank's place among those that share samples."""
        place = self.coordinate(rank)
        return DataRank(
            rank=place["replicate"] * self.shard + place["shard"],
            world_size=self.data,
            counts=place["pipeline"] == self.pipeline - 1 and place["tensor"] == 0,
        )

    def peers(self, rank: int, axes: Sequence[Axis]) -> tuple[int, ...]:
        """The global ranks that differ from `rank` only along `axes`, itself among them, in order."""
        place = self.coordinate(rank)
        steps = [range(self.sizes[axis]) if axis in axes else (place[axis],) for axis in AXES]
        return tuple(self.rank_at(dict(zip(AXES, cell, strict=True))) for cell in product(*steps))
