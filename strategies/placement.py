"""Which boxes of a global tensor the ranks of a DTensor hold, whatever its placements: as a grid where one describes
them, else box by box."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dtrain.cluster.errors import CheckpointError
from dtrain.strategies.boxes import Box, Layout, Patches
from dtrain.strategies.degrees import DATA_AXES

Span = tuple[int, int]  # (offset, length) along one dim
Cuts = tuple[tuple[int, int, int], ...]  # (dim, degree, blocks) of each mesh axis, the order in which they are cut


def dtensor_layout(tensor: DTensor) -> Layout | Patches:
    """Equal on every rank that holds a part of it."""
    return _layout(tuple(tensor.shape), tuple(tensor.placements), _Ranks(tensor.device_mesh))


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it, which for a plain tensor is all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_boxes(tensor: DTensor) -> list[tuple[Box, Tensor]]:
    """This rank's part as views, each with the box of the global tensor that it is."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    local = tensor.to_local()
    spans = _spans(tuple(tensor.shape), _cuts(tuple(tensor.placements), tensor.device_mesh), tuple(coordinate))
    found = []
    for cell in product(*(_with_places(dim) for dim in spans)):
        part = local
        for dim, (_, length, begin) in enumerate(cell):
            part = part.narrow(dim, begin, length)
        found.append((Box(tuple(c[0] for c in cell), tuple(c[1] for c in cell)), part))
    return found


def first_copies(tensors: Iterable[DTensor]) -> Iterator[bool]:
    """Whether this rank is the first of those that hold the same part, of each. Many tensors lie in a few ways."""
    known: dict[tuple[int, tuple[Placement, ...]], bool] = {}
    for tensor in tensors:
        key = id(tensor.device_mesh), tensor.placements
        if key not in known:
            known[key] = _is_first_copy(tensor)
        yield known[key]


def _is_first_copy(tensor: DTensor) -> bool:
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    inside = (c == 0 for c, place in zip(coordinate, tensor.placements, strict=True) if place.is_replicate())
    return all(inside) and all(c == 0 for c in _other_data_axes(tensor.device_mesh).values())


class _Ranks:
    """A mesh, to be remembered by the ranks that it holds."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._key = (tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist()), mesh.mesh_dim_names)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ranks) and self._key == other._key


@cache
def _layout(shape: tuple[int, ...], placements: tuple[Placement, ...], ranks: _Ranks) -> Layout | Patches:
    mesh = ranks.mesh
    cuts = _cuts(placements, mesh)
    owners = dict(_owners(mesh, cuts))
    dims = [dim for dim, degree, _ in cuts if degree > 1]
    if len(set(dims)) == len(dims) and all(blocks == 1 for _, _, blocks in cuts):
        axis_of = {dim: axis for axis, (dim, degree, _) in enumerate(cuts) if degree > 1}
        parts = tuple(cuts[axis_of[dim]][1] if dim in axis_of else 1 for dim in range(len(shape)))

        def coordinate_of(cell: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(cell[dim] if axis_of.get(dim) == axis else 0 for axis, (dim, _, _) in enumerate(cuts))

        return Layout(parts, tuple(owners[coordinate_of(cell)] for cell in product(*map(range, parts))))
    boxes = []
    for coordinate, holders in owners.items():
        for cell in product(*_spans(shape, cuts, coordinate)):
            box = Box(tuple(begin for begin, _ in cell), tuple(length for _, length in cell))
            if box.num_elements:
                boxes.append((box, holders))
    return Patches(tuple(boxes))


def _cuts(placements: Sequence[Placement], mesh: DeviceMesh) -> Cuts:
    """One entry a mesh axis; degree 1 where it does not cut. The last axis cuts first: fully_shard comes after tensor.

    Raises CheckpointError for placements that mean something else."""
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    found = []
    for axis, place in enumerate(placements):
        if isinstance(place, _StridedShard):
            later = [p for p in placements[axis + 1 :] if isinstance(p, Shard | _StridedShard) and p.dim == place.dim]
            blocks = 1 if later else place.split_factor
            found.append((place.dim, mesh.size(axis), int(blocks)))
        elif isinstance(place, Shard):
            found.append((place.dim, mesh.size(axis), 1))
        elif isinstance(place, Replicate):
            found.append((0, 1, 1))
        else:
            raise CheckpointError(f"no canonical layout for placements {tuple(placements)} over {names}")
    _refuse_other_orders(placements)
    return tuple(found)


def _refuse_other_orders(placements: Sequence[Placement]) -> None:
    """A plain Shard before another cut of the same dim would cut first."""
    for axis, place in enumerate(placements):
        again = [p for p in placements[axis + 1 :] if isinstance(p, Shard | _StridedShard)]
        if type(place) is Shard and any(p.dim == place.dim for p in again):
            raise CheckpointError(f"no canonical layout for placements {tuple(placements)}")


def _spans(shape: tuple[int, ...], cuts: Cuts, coordinate: tuple[int, ...]) -> list[list[Span]]:
    """For each dim what lies at `coordinate`, in the order in which it lies there."""
    spans: list[list[Span]] = [[(0, size)] for size in shape]
    for (dim, degree, blocks), index in reversed(list(zip(cuts, coordinate, strict=True))):
        if degree > 1:
            spans[dim] = [part for block in _in_blocks(spans[dim], blocks) for part in _chunk(block, degree, index)]
    return [[span for span in dim if span[1]] or dim[:1] or [(0, 0)] for dim in spans]


def _in_blocks(spans: list[Span], blocks: int) -> Iterator[list[Span]]:
    size = sum(length for _, length in spans) // blocks
    for block in range(blocks):
        yield _between(spans, block * size, (block + 1) * size)


def _chunk(spans: list[Span], degree: int, index: int) -> list[Span]:
    """As torch.chunk: ceil-sized, the last ones smaller or empty."""
    size = sum(length for _, length in spans)
    step = -(-size // degree)
    return _between(spans, min(index * step, size), min((index + 1) * step, size))


def _between(spans: list[Span], begin: int, end: int) -> list[Span]:
    """The elements [begin, end) of what `spans` line up; one empty span, at its place, where there are none."""
    found, passed = [], 0
    for offset, length in spans:
        first, last = max(begin - passed, 0), min(end - passed, length)
        if first < last:
            found.append((offset + first, last - first))
        passed += length
    return found or [(spans[-1][0] + spans[-1][1], 0)]


def _with_places(spans: list[Span]) -> list[tuple[int, int, int]]:
    """(offset, length, where it begins in the local tensor)."""
    found, begin = [], 0
    for offset, length in spans:
        found.append((offset, length, begin))
        begin += length
    return found


def _owners(mesh: DeviceMesh, cuts: Cuts) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each coordinate along the axes that cut (0 along the others): the global ranks that hold what lies there."""
    whole = _whole_mesh(mesh)
    names = list(whole.mesh_dim_names or range(whole.ndim))
    own = list(mesh.mesh_dim_names or range(mesh.ndim))
    place = whole.get_coordinate()
    assert place is not None
    for coordinate in product(*(range(degree) for _, degree, _ in cuts)):
        index: list[Any] = []
        for axis, name in enumerate(names):
            if name in own:
                cut = own.index(name)
                index.append(coordinate[cut] if cuts[cut][1] > 1 else slice(None))
            else:
                index.append(slice(None) if name in DATA_AXES else place[axis])
        yield coordinate, tuple(whole.mesh[tuple(index)].flatten().tolist())


def _whole_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh of which this one is a part, where it has all of its axes' names; copies of the model lie along the
    others. torch 2.13 tells it only in this way."""
    root = mesh._get_root_mesh()
    return root if set(mesh.mesh_dim_names or ()) <= set(root.mesh_dim_names or ()) and mesh.mesh_dim_names else mesh


def _other_data_axes(mesh: DeviceMesh) -> Mapping[str, int]:
    """Where this rank stands along the data axes that `mesh` does not have."""
    whole = _whole_mesh(mesh)
    place = whole.get_coordinate()
    assert place is not None
    own = mesh.mesh_dim_names or ()
    return {n: c for n, c in zip(whole.mesh_dim_names or (), place, strict=True) if n in DATA_AXES and n not in own}
