"""Activation checkpointing and torch.compile, unit by unit: the forward of a module is replaced, nothing else.

The module stays the same object with the same parameter names; its class becomes a subclass with another `forward`, as
fully_shard does it, so that what a deep copy computes with is its own. Hooks stay outside: fsdp gathers before the
forward and after a recomputation has begun. Order, as torch recommends: checkpointing, then compile, then fully_shard.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.cluster.errors import UsageError

Forward = Callable[..., Any]  # (module, *args, **kwargs)

# So many shapes and modes (training, evaluation, one sample, several) a class of units may meet before it runs eagerly.
RECOMPILE_LIMIT = 16
MAX_COMPILE_PROCESSES = 32  # a rank, as torch has it


def prepare_forwards(
    model: nn.Module, units: Sequence[tuple[str, nn.Module]], *, checkpointing: bool, compiled: bool
) -> None:
    """In place, before the model is spread over ranks. `units`: as strategies/units.py finds them, inner ones first.

    Raises UsageError where there is nothing to do it to.
    """
    modules = [module for _, module in units]
    if checkpointing and not modules:
        raise UsageError(
            "train.activation_checkpointing: full keeps only what goes into each unit of the model, and this one has "
            "none: no ModuleList or Sequential. Name its large modules in strategy.wrap, or set none"
        )
    if checkpointing:
        _replace(_without(modules, lambda one, other: one in _inside(other)), _checkpointed)
    if compiled:  # inner units only: another one's gathering inside a compiled forward would cut it in two
        _replace(_without(modules, lambda one, other: other in _inside(one)) or [model], _compiled)


def _without(modules: Sequence[nn.Module], hit: Callable[[nn.Module, nn.Module], bool]) -> list[nn.Module]:
    """Those that `hit` with none of the others."""
    return [one for one in modules if not any(hit(one, other) for other in modules)]


def _inside(module: nn.Module) -> set[nn.Module]:
    return set(module.modules()) - {module}


def _replace(modules: Sequence[nn.Module], change: Callable[[Forward, int], Forward]) -> None:
    """One new class for all modules of a class: they share what is compiled."""
    numbers = Counter(type(module) for module in modules if "forward" not in vars(module))
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    for module in modules:
        own = vars(module).pop("forward", None)  # somebody has replaced it already, on this object only
        if own is not None:
            module.__class__ = _subclass(type(module), change(_ignoring_self(own), 1))
            continue
        cls = type(module)
        if cls not in classes:
            classes[cls] = _subclass(cls, change(cls.forward, numbers[cls]))
        module.__class__ = classes[cls]


def _ignoring_self(bound: Callable[..., Any]) -> Forward:
    @functools.wraps(bound)
    def forward(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return forward


def _subclass(cls: type[nn.Module], forward: Forward) -> type[nn.Module]:
    names = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), names)


def _checkpointed(forward: Forward, _: int) -> Forward:
    """Not reentrant: random numbers and autocast are those of the first time, and gradients come in one part."""

    @functools.wraps(forward)
    def recomputing(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, module, *args, use_reentrant=False, **kwargs)

    return recomputing


def _compiled(forward: Forward, number: int) -> Forward:
    """`number` modules of this class may bring as many shapes. The first dimension of what goes in is that of samples:
    it is taken as variable from the beginning, so that one graph serves all of them, whichever comes first."""
    limit = max(RECOMPILE_LIMIT, 2 * number)
    torch_compile: Any = torch.compile  # the overloads of torch 2.13 do not know these two arguments
    compiled = torch_compile(forward, isolate_recompiles=True, recompile_limit=limit)

    @functools.wraps(forward)
    def marking(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(module, *args, **kwargs)

    return marking


def prepare_compiler(device_type: str, ranks_per_node: int) -> None:
    """Raises UsageError where this machine can't compile. The node's cores are shared by its ranks."""
    if device_type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise UsageError(
                f"train.compile: it needs a C++ compiler on a CPU, and {compiler} is not on this machine. Install g++, "
                "set CXX, or set train.compile: false"
            )
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        import torch._inductor.config

        cores = len(os.sched_getaffinity(0))
        torch._inductor.config.compile_threads = max(1, min(MAX_COMPILE_PROCESSES, cores // ranks_per_node))
