"""Who writes what: a pure function of the specs, so that every rank decides alike without talking. Torch-free.

Parts of tensors are grouped by the ranks that hold them. A group's bytes, laid end to end, are cut evenly among its
owners, inside tensors too, but only between slices of a part's first dim that is longer than 1: what a rank writes of
a part is then one box that is contiguous in the part.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dtrain.cluster.errors import CheckpointError
from dtrain.runtime.checkpoint.dtypes import item_bytes
from dtrain.runtime.checkpoint.grid import part_box
from dtrain.runtime.checkpoint.manifest import BoxesRule, GridRule, TensorInfo
from dtrain.strategies.boxes import Box, Layout, Patches, TensorSpec

Owners = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A box of a named tensor that one rank writes; never empty."""

    name: str
    box: Box


@dataclass(slots=True)
class _Group:
    """The parts that the same ranks hold. `position` runs over the group's bytes while parts are dealt out."""

    owners: Owners
    total: int = 0
    position: int = 0
    bounds: list[int] = field(default_factory=list)  # bounds[j]: where owner j begins; one more at the end
    low: int = 0  # the bounds of the rank that is planned for
    high: int = 0

    def close(self, rank: int | None) -> None:
        num = len(self.owners)
        self.bounds = [self.total * owner // num for owner in range(num + 1)]
        if rank is not None:
            place = self.owners.index(rank)
            self.low, self.high = self.bounds[place], self.bounds[place + 1]


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of tensors of one shape and item size; cut between the slices of `dim`."""

    group: _Group
    box: Box
    dim: int
    num_slices: int
    slice_bytes: int
    size_bytes: int

    def cut(self, begin: int, bound: int) -> int:
        """The slice boundary nearest to a byte position of the group, for a part that lies from `begin` on.
        Monotonic in `bound`, so neighbours agree."""
        nearest = (2 * (bound - begin) + self.slice_bytes) // (2 * self.slice_bytes)
        return min(max(nearest, 0), self.num_slices)

    def slices(self, first: int, last: int) -> Box:
        if first == 0 and last == self.num_slices:
            return self.box
        offsets, shape = list(self.box.offsets), list(self.box.shape)
        offsets[self.dim] += first
        shape[self.dim] = last - first
        return Box(tuple(offsets), tuple(shape))


class _Groups:
    """The parts of all tensors, by group. Tensors share few layouts and shapes: what was worked out is kept."""

    def __init__(self, world_size: int, rank: int | None) -> None:
        self._world_size = world_size
        self._rank = rank  # only parts that this rank holds; None: all parts
        self._of_layout: dict[int, list[tuple[int, _Group]]] = {}
        self._of_owners: dict[Owners, _Group] = {}
        self._of_shape: dict[tuple[int, tuple[int, ...], int], list[_Part]] = {}

    def measure(self, specs: Sequence[TensorSpec]) -> list[list[_Part]]:
        """The parts of each tensor that hold elements; afterwards every group knows its bounds. The caller keeps the
        layouts alive, so that an id stands for one layout."""
        found = [self._parts(spec) for spec in specs]
        for parts in found:
            for part in parts:
                part.group.total += part.size_bytes
        for group in self._of_owners.values():
            group.close(self._rank)
        return found

    def _parts(self, spec: TensorSpec) -> list[_Part]:
        item = item_bytes(spec.dtype)
        key = (id(spec.layout), spec.shape, item)
        if key not in self._of_shape:
            self._of_shape[key] = [_part(box, group, item) for box, group in self._cells(spec) if box.num_elements]
        return self._of_shape[key]

    def _cells(self, spec: TensorSpec) -> Iterator[tuple[Box, _Group]]:
        """The boxes that this rank holds, each with its group."""
        layout = spec.layout
        if isinstance(layout, Patches):
            yield from ((box, self._group(owners)) for box, owners in layout.boxes if self._holds(owners))
        else:
            yield from ((part_box(spec.shape, layout.parts, i), group) for i, group in self._owned(layout))

    def _holds(self, owners: Owners) -> bool:
        return self._rank is None or self._rank in owners

    def _owned(self, layout: Layout) -> list[tuple[int, _Group]]:
        """(index of the part, its group)"""
        if id(layout) not in self._of_layout:
            self._of_layout[id(layout)] = [
                (index, self._group(owners)) for index, owners in enumerate(layout.owners) if self._holds(owners)
            ]
        return self._of_layout[id(layout)]

    def _group(self, owners: Owners) -> _Group:
        if owners not in self._of_owners:
            if not owners or not all(0 <= owner < self._world_size for owner in owners):
                raise CheckpointError(f"a layout names the owners {owners} in a world of {self._world_size} ranks")
            self._of_owners[owners] = _Group(owners)
        return self._of_owners[owners]


def _part(box: Box, group: _Group, item: int) -> _Part:
    dim = next((d for d, size in enumerate(box.shape) if size > 1), 0)
    num_slices = box.shape[dim] if box.shape else 1
    size_bytes = box.num_elements * item
    return _Part(group, box, dim, num_slices, size_bytes // num_slices, size_bytes)


def plan_shares(specs: Sequence[TensorSpec], rank: int, world_size: int) -> list[Share]:
    """What `rank` writes. Over all ranks the shares cover every element of every tensor exactly once."""
    shares = []
    for spec, parts in zip(specs, _Groups(world_size, rank).measure(specs), strict=True):
        for part in parts:
            group, begin = part.group, part.group.position
            group.position = end = begin + part.size_bytes
            if end <= group.low or begin >= group.high:
                continue
            first, last = part.cut(begin, group.low), part.cut(begin, group.high)
            if first < last:
                shares.append(Share(name=spec.name, box=part.slices(first, last)))
    return shares


def manifest_tensors(specs: Sequence[TensorSpec], world_size: int) -> dict[str, TensorInfo]:
    """Every tensor with the rule that says which writer (rank) holds what: what plan_shares() gives for all ranks."""
    # One owner a part: nothing is dealt out, and all tensors of the layout share one rule.
    layouts = {id(spec.layout): spec.layout for spec in specs}
    rules = {key: _owners_rule(layout) for key, layout in layouts.items()}
    dealt = [spec for spec in specs if rules[id(spec.layout)] is None]
    parts = iter(_Groups(world_size, None).measure(dealt))
    return {
        spec.name: TensorInfo(
            dtype=spec.dtype, shape=spec.shape, layout=rules[id(spec.layout)] or _dealt_rule(spec, next(parts))
        )
        for spec in specs
    }


def _owners_rule(layout: Layout | Patches) -> GridRule | BoxesRule | None:
    if isinstance(layout, Patches):
        if any(len(owners) != 1 for _, owners in layout.boxes):
            return None
        return BoxesRule(boxes=tuple((owners[0], box) for box, owners in layout.boxes))
    if any(len(owners) != 1 for owners in layout.owners):
        return None
    return GridRule(parts=layout.parts, writers=_runs([owners[0] for owners in layout.owners]))


def _dealt_rule(spec: TensorSpec, parts: Sequence[_Part]) -> GridRule | BoxesRule:
    pieces = [list(_pieces(part)) for part in parts]
    if isinstance(spec.layout, Patches):
        return BoxesRule(boxes=tuple(piece for part in pieces for piece in part))
    if len(pieces) == len(spec.layout.owners) and all(len(piece) == 1 for piece in pieces):
        return GridRule(parts=spec.layout.parts, writers=_runs([writer for ((writer, _),) in pieces]))
    return BoxesRule(boxes=tuple(piece for part in pieces for piece in part))


def _pieces(part: _Part) -> Iterator[tuple[int, Box]]:
    """(owner, what it writes of the part). Deals the part out: its group moves on."""
    group, begin = part.group, part.group.position
    group.position += part.size_bytes
    place, first = bisect_right(group.bounds, begin) - 1, 0
    while first < part.num_slices:
        last = part.cut(begin, group.bounds[place + 1])
        if first < last:
            yield group.owners[place], part.slices(first, last)
        first, place = last, place + 1


def _runs(writers: list[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for writer in writers:
        if runs and sum(runs[-1]) == writer:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((writer, 1))
    return tuple(runs)
