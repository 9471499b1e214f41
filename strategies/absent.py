"""A tensor that lies on another rank: shape, dtype and device without values. What is computed from one is one too, so
that a model's own forward can run where parts of it are missing, and a value that is needed can't be made up.

Which tensors are absent, and what takes their place, is the pipeline's affair (pipelinecut.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from dtrain.cluster.errors import UsageError

aten = torch.ops.aten


class NeedsValues(UsageError):
    """Somebody looked at the values of an absent tensor."""


# What is made in the likeness of a tensor without a look at its values is real: position of the fill value, or itself.
_FILLED: dict[Any, Callable[[tuple[Any, ...]], float]] = {
    aten.zeros_like.default: lambda args: 0,
    aten.new_zeros.default: lambda args: 0,
    aten.ones_like.default: lambda args: 1,
    aten.new_ones.default: lambda args: 1,
    aten.full_like.default: lambda args: args[1],
    aten.new_full.default: lambda args: args[2],
}

# Looks on while absent tensors are computed with: (operator, its arguments, its results).
Watch = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
watching: ContextVar[Watch | None] = ContextVar("watching", default=None)

# Write to arguments although their schemas do not say so.
_STATISTICS = {aten.native_batch_norm.default: (3, 4), aten.cudnn_batch_norm.default: (3, 4)}


def _refuse(tensor: Tensor, func: Any) -> None:
    """It would hold values that nobody has, and could not be told from others afterwards."""
    raise NeedsValues(f"{func} writes values that are not here into a tensor that is")


# Asked before values that are not here would go into a tensor that is: (the tensor, operator). Raises, or lets it go.
writing: ContextVar[Callable[[Tensor, Any], None]] = ContextVar("writing", default=_refuse)


class Absent(Tensor):
    """`meta`: the tensor without its values, which others may have too; `born`: a mark for who follows values through a
    model."""

    meta: Tensor
    born: int

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, *, requires_grad: bool = False, born: int = 0) -> Absent:
        return Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
            requires_grad=requires_grad,
        )

    def __init__(self, meta: Tensor, device: torch.device, *, requires_grad: bool = False, born: int = 0) -> None:
        self.meta = meta
        self.born = born

    def fresh(self) -> Absent:
        """Another one without values, that was computed from nothing: a gradient it does not want."""
        return Absent(self.meta, self.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Absent({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {})


class AbsentFirst(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, what is computed from an absent tensor and one of another class (a DTensor) is absent. Else
    the class that stands further left would have its way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, Absent) for each in types):
            return _compute(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def absent_like(tensor: Tensor, device: torch.device | None = None, *, born: int = 0) -> Tensor:
    """As `tensor`, which may be absent itself, in everything but its values. A parameter stays one."""
    found = Absent(_like(tensor), device or tensor.device, born=born)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(found, requires_grad=tensor.requires_grad)
    return found.requires_grad_(tensor.requires_grad)


def is_absent(tensor: object) -> bool:
    return isinstance(tensor, Absent)


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    key = None if kwargs else _signature(func, args)
    known = _known.get(key) if key is not None else None
    device = kwargs.get("device") or _first_absent(args, kwargs).device
    if known is not None:
        result: Any = Absent(known, device)
    else:
        _note_writes(func, args, kwargs)
        found = _without_values(func, args, kwargs)
        if func in _FILLED:
            return torch.full(found.shape, _FILLED[func](args), dtype=found.dtype, device=device)
        result = tree_map(lambda t: Absent(t, torch.device(device)) if isinstance(t, Tensor) else t, found)
        if _has_aliases(func):
            result = return_and_correct_aliasing(func, args, kwargs, result)  # type: ignore[no-untyped-call]
        elif key is not None and isinstance(result, Absent) and len(_known) < _MOST_KNOWN:
            _known[key] = result.meta
    watch = watching.get()
    if watch is not None:
        watch(func, args, kwargs, result)
    return result


def _first_absent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Absent:
    for arg in args:  # nearly always one of these
        if isinstance(arg, Absent):
            return arg
    return next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Absent))


# What operators gave that make one new tensor: torch works it out in Python, and a training loop asks again and again.
_known: dict[tuple[Any, ...], Tensor] = {}
_MOST_KNOWN = 4096


def _signature(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All that the form of the result depends on; None for arguments of other kinds."""
    parts: list[Any] = [func, torch.get_default_dtype()]
    for arg in args:
        if isinstance(arg, Tensor):
            parts += (arg.shape, arg.stride(), arg.dtype)
        elif arg is None or isinstance(arg, bool | int | float):
            parts += (type(arg), arg)
        else:
            return None
    return tuple(parts)


def _without_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of tensors on the meta device. Raises NeedsValues."""
    meta_args, meta_kwargs = tree_map(_meta, (args, kwargs))
    if kwargs.get("device") is not None:
        meta_kwargs["device"] = "meta"
    try:
        return func(*meta_args, **meta_kwargs)
    except RuntimeError as error:
        name = str(func).removesuffix(".default")
        raise NeedsValues(f"{name} can't do without values: {error}") from error


@cache
def _has_aliases(func: Any) -> bool:
    """Whether it gives views of its arguments, or writes to them."""
    schema = func._schema
    return any(value.alias_info is not None for value in (*schema.arguments, *schema.returns)) or func in _STATISTICS


def _meta(value: Any) -> Any:
    if isinstance(value, Absent):
        return value.meta
    return _like(value) if isinstance(value, Tensor) else value


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _note_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for position, name in _written(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        for tensor in tree_leaves(value):
            if isinstance(tensor, Absent):
                tensor.meta = _like(tensor.meta)  # its own from here on: it may get another shape
            elif isinstance(tensor, Tensor):
                writing.get()(tensor, func)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that it writes to."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write) or position in _STATISTICS.get(func, ())
    )
