"""The ranks of a job as torch's mesh of named axes."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dtrain.strategies.degrees import Axis, Degrees


def make_mesh(degrees: Degrees, device_type: str, axes: tuple[Axis, ...] = ()) -> DeviceMesh:
    """With the axes whose degree is above 1, and those in `axes` whatever their degree, outermost first. Collective."""
    sizes = {axis: size for axis, size in degrees.sizes.items() if size > 1 or axis in axes}
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def group_of(mesh: DeviceMesh, axis: Axis) -> torch.distributed.ProcessGroup | None:
    """The ranks that differ from this one along one axis only; None where the mesh has no such axis."""
    return mesh.get_group(axis) if axis in (mesh.mesh_dim_names or ()) else None
