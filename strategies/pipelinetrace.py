"""Runs a model's own forward without values, to learn what its units take, give, use and cost, and where it can be cut.

A model can be cut before a unit if what comes later sees of what came before only what that unit is called with. Where
to cut is pipelinesplit.py's choice; the real thing on a rank is pipelinecut.py's.
"""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from dtrain.cluster.errors import UsageError
from dtrain.strategies.absent import Absent, NeedsValues, absent_like, watching, writing

Run = Callable[[nn.Module], Any]  # one forward of a model, on the batch at hand


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """`units` in the order in which the forward comes to them. Interval 0 lies before the first one, interval i begins
    with units[i - 1]."""

    units: tuple[str, ...]
    cuttable: frozenset[int]  # intervals before which the model can be cut
    costs: tuple[float, ...]  # floating-point operations of a forward, an interval each
    parameters: tuple[frozenset[str], ...]  # used in an interval, under the first of their names
    written: Mapping[str, tuple[int, bool]]  # buffer -> the interval that writes to it, whether values go into it


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """One tensor that goes into a stage: where it stands in the call of its first unit."""

    position: int  # among the leaves of (args, kwargs)
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    written: bool = False  # in place, by the unit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shapes:
    """Of one forward: what goes into the units where the model is cut, by unit, and what the others give, and `leaves`:
    modules of torch's own outside all units, called once, all that they give computed with parameters. What is needed
    of that after the next cut crosses it, so a later stage can do without them as without the units."""

    crossings: Mapping[str, tuple[Crossing, ...]]
    outputs: Mapping[str, Any]
    leaves: Mapping[str, int]  # name -> the stage in which it is called


_NOT_FOLLOWED = "strategy.pipeline: the model's forward can't be followed without values, to see where it can be cut"


class Skeleton:
    """A copy of a model without its parameters' values, for forwards that cost next to nothing."""

    def __init__(self, model: nn.Module, units: Sequence[str], device: torch.device) -> None:
        """Raises UsageError for a model that can't be copied."""
        self._names = {id(p): name for name, p in model.named_parameters()}
        memo: dict[int, Any] = {id(p): absent_like(p, device) for p in model.parameters()}
        self._parameters = {id(memo[key]): name for key, name in self._names.items()}
        try:
            self._model = copy.deepcopy(model, memo)
        except Exception as error:
            raise UsageError(f"strategy.pipeline: the model can't be copied to look into it: {error}") from error
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        modules = dict(self._model.named_modules())
        self._units = {name: modules[name] for name in units}
        self._leaves = {
            name: module
            for name, module in modules.items()
            if _is_leaf(module) and not any(name.startswith(f"{unit}.") for unit in units) and name not in units
        }

    def trace(self, run: Run) -> Trace:
        """Raises UsageError where the forward needs values that a rank would not have."""
        try:
            return _Tracer(self._model, self._units, self._parameters).trace(run)
        except NeedsValues as error:
            raise UsageError(f"{_NOT_FOLLOWED}{_place(error)}: {error}") from error
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{_NOT_FOLLOWED}{_place(error)}: {type(error).__name__}: {error}") from error

    def shapes(self, run: Run, cuts: Sequence[str], like: nn.Module) -> Shapes:
        """`like`: the model whose modes (training, evaluation) hold."""
        for mine, theirs in zip(self._model.modules(), like.modules(), strict=True):
            mine.training = theirs.training
        entered: dict[str, list[tuple[Crossing, Tensor, int]]] = {}  # with the version that the tensor had then
        outputs: dict[str, Any] = {}
        leaves: dict[str, int] = {}
        real: set[str] = set()  # leaves that can't be skipped

        def on_enter(name: str, args: Any, kwargs: Any) -> None:
            if name in cuts:
                entered[name] = [(crossing, leaf, leaf._version) for crossing, leaf in _crossings((args, kwargs))]
            elif name in self._leaves:
                if name in leaves:
                    real.add(name)
                leaves[name] = len(entered)

        def on_leave(name: str, output: Any) -> Any:
            if name in self._leaves:
                if not isinstance(output, Absent):
                    real.add(name)
            else:
                output = _without_values(output)
            outputs[name] = tree_map_only(Absent, Absent.fresh, output)  # the model may give its own another shape
            return output

        watched = {**self._units, **self._leaves}
        with _hooked(watched, on_enter, on_leave), _plainly(), _allowing_writes(lambda tensor, func: None):
            run(self._model)
        return Shapes(
            crossings={name: tuple(_noting_writes(*each) for each in found) for name, found in entered.items()},
            outputs=outputs,
            leaves={name: stage for name, stage in leaves.items() if name not in real},
        )


def _is_leaf(module: nn.Module) -> bool:
    """Whether a call of it does nothing but compute what it returns: torch's own, without state but parameters."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not any(True for _ in module.children())
        and not module._buffers
        and "forward" not in vars(module)
    )


def _place(error: Exception) -> str:
    """ " (file:line)": the last place in the code of the model that led to `error`."""
    ours = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _without_values(output: Any) -> Any:
    """What a rank knows of a unit's output that it does not compute. A tensor that has values here would have other
    ones for the next batch of these shapes."""
    return tree_map_only(Tensor, lambda t: t if isinstance(t, Absent) else absent_like(t), output)


def _crossings(call: Any) -> Iterator[tuple[Crossing, Tensor]]:
    for position, leaf in enumerate(tree_leaves(call)):
        if isinstance(leaf, Absent) and not isinstance(leaf, nn.Parameter):
            shape = tuple(leaf.shape)
            yield Crossing(position=position, shape=shape, dtype=leaf.dtype, requires_grad=leaf.requires_grad), leaf


def _noting_writes(crossing: Crossing, tensor: Tensor, version: int) -> Crossing:
    return replace(crossing, written=tensor._version != version)


class _Tracer:
    def __init__(self, model: nn.Module, units: Mapping[str, nn.Module], parameters: Mapping[int, str]) -> None:
        self._model = model
        self._units = units
        self._parameters = parameters
        self._buffers = {id(buffer): (name, buffer) for name, buffer in model.named_buffers()}
        self._order: list[str] = []
        self._broken: set[int] = set()
        self._costs: dict[int, float] = defaultdict(float)
        self._used: dict[int, set[str]] = defaultdict(set)
        self._written: dict[str, tuple[int, bool]] = {}
        self._versions = self._look()

    def trace(self, run: Run) -> Trace:
        token = watching.set(self._watch)
        try:
            with _hooked(self._units, self._enter, self._leave), _plainly(), _allowing_writes(self._on_write):
                run(self._model)
        finally:
            watching.reset(token)
        self._note_writes()
        for number, name in enumerate(self._order, start=1):
            self._used[number] |= {self._parameters[id(p)] for p in self._units[name].parameters()}
            if self._order.count(name) > 1:
                self._broken.add(number)
        intervals = range(len(self._order) + 1)
        return Trace(
            units=tuple(self._order),
            cuttable=frozenset(set(intervals[1:]) - self._broken),
            costs=tuple(self._costs[i] for i in intervals),
            parameters=tuple(frozenset(self._used[i]) for i in intervals),
            written=self._written,
        )

    @property
    def _interval(self) -> int:
        return len(self._order)

    def _enter(self, name: str, args: Any, kwargs: Any) -> Any:
        """A new interval. What the unit is called with goes on from here as if it were made here."""
        self._note_writes()
        values = [leaf for leaf in tree_leaves((args, kwargs)) if self._is_value(leaf)]
        for leaf in values:
            self._broken |= set(range(leaf.born + 1, self._interval + 1))
        self._order.append(name)
        if not values:
            self._broken.add(self._interval)
        return tree_map_only(Absent, self._renewed, (args, kwargs))

    def _leave(self, name: str, output: Any) -> Any:
        for leaf in tree_leaves(output):
            if isinstance(leaf, float | int) and not isinstance(leaf, bool):
                raise UsageError(
                    f"strategy.pipeline: {name} returns a number ({leaf}) beside its tensors, which the other stages "
                    "would not know. Return a tensor"
                )
        return tree_map_only(Tensor, self._without_values, output)

    def _without_values(self, leaf: Tensor) -> Tensor:
        return leaf if isinstance(leaf, Absent) else absent_like(leaf, born=self._interval)

    def _renewed(self, leaf: Tensor) -> Tensor:
        return absent_like(leaf, born=self._interval).clone() if self._is_value(leaf) else leaf

    def _is_value(self, leaf: object) -> bool:
        return isinstance(leaf, Absent) and id(leaf) not in self._parameters

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, Tensor):
                continue
            if id(leaf) in self._parameters:
                self._used[self._interval].add(self._parameters[id(leaf)])
            elif isinstance(leaf, Absent):
                self._broken |= set(range(leaf.born + 1, self._interval + 1))
            elif leaf.requires_grad:
                raise UsageError(
                    f"strategy.pipeline: the forward uses a parameter of shape {tuple(leaf.shape)} that is not "
                    "reached through the model. Make it a parameter of one of its modules"
                )
        for leaf in tree_leaves(result):
            if isinstance(leaf, Absent):
                leaf.born = self._interval
        count = flop_registry.get(getattr(func, "_overloadpacket", func))
        if count is not None:
            self._costs[self._interval] += count(*args, **kwargs, out_val=result)

    def _look(self) -> dict[int, int]:
        return {key: buffer._version for key, (_, buffer) in self._buffers.items()}

    def _note_writes(self) -> None:
        now = self._look()
        for key, version in now.items():
            if version != self._versions[key]:
                self._written.setdefault(self._buffers[key][0], (self._interval, False))
        self._versions = now

    def _on_write(self, tensor: Tensor, func: Any) -> None:
        if id(tensor) not in self._buffers:
            raise UsageError(
                f"strategy.pipeline: {func} writes computed values into a tensor that the forward has made itself, and "
                "a rank without those values could not tell. Put the values together with torch.cat or torch.where"
            )
        self._written[self._buffers[id(tensor)][0]] = (self._interval, True)


@contextlib.contextmanager
def _hooked(
    units: Mapping[str, nn.Module], on_enter: Callable[[str, Any, Any], Any], on_leave: Callable[[str, Any], Any]
) -> Iterator[None]:
    handles = []
    for name, unit in units.items():

        def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> Any:
            return on_enter(name, args, kwargs)

        def leave(_: nn.Module, args: Any, output: Any, name: str = name) -> Any:
            return on_leave(name, output)

        handles.append(unit.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(unit.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """There is nothing to compile for: compiled units run as they were written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _allowing_writes(on_write: Callable[[Tensor, Any], None]) -> Iterator[None]:
    token = writing.set(on_write)
    try:
        yield
    finally:
        writing.reset(token)
