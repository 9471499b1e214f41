"""The tensors in what a model's forward returns, which may be anything: torch's pytree knows no dataclasses, no classes
derived from dict, and no objects with tensors as attributes (distributions, say)."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


def map_tensors(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The same with each tensor in it changed; `output` itself stays as it is."""

    def opened(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if isinstance(leaf, dict):
            found = copy.copy(leaf)
            found.update({key: map_tensors(change, value) for key, value in leaf.items()})
            return found
        attributes = _attributes(leaf)
        if not attributes:
            return leaf
        found = copy.copy(leaf)
        for name, value in attributes.items():
            object.__setattr__(found, name, map_tensors(change, value))  # of a frozen dataclass, too
        return found

    return tree_map(opened, output)


def tensors_in(output: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, output)
    return found


def _attributes(leaf: Any) -> dict[str, Any]:
    """Empty for what has no tensors to be changed: classes, modules, plain values."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {
            field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf) if hasattr(leaf, field.name)
        }
    if isinstance(leaf, nn.Module | type) or not hasattr(leaf, "__dict__"):
        return {}
    return {name: value for name, value in vars(leaf).items() if isinstance(value, Tensor)}
