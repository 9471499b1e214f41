"""One rank's part of a model that is cut into stages: the user's own module, where parameters of other ranks' stages
have no values. A stage runs the model's own forward from its beginning: what lies before the stage is computed without
values, the first unit of the stage is called with what has come from the stage before, and the first unit of the next
one ends it. A value that took another way is missing, and what needs it is refused in words.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from dtrain.cluster.errors import UsageError
from dtrain.strategies.absent import Absent, NeedsValues, absent_like
from dtrain.strategies.outputs import tensors_in
from dtrain.strategies.pipelinetrace import Crossing, Shapes, Trace
from dtrain.strategies.seeding import seed_torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A model's units and parameters by stage; the same on every rank."""

    firsts: tuple[str, ...]  # the first unit of stage 1, 2, ...
    units: Mapping[str, int]  # unit -> its stage; those that can be skipped
    parameters: Mapping[str, tuple[int, ...]]  # name -> the stages that use it; the first where none does
    buffers: Mapping[str, int]  # name -> the stage whose values count
    tainted: frozenset[str]  # buffers that only their own stage can write

    @property
    def num_stages(self) -> int:
        return len(self.firsts) + 1


def make_cut(model: nn.Module, trace: Trace, cuts: Sequence[int]) -> Cut:
    """`cuts`: the intervals with which stages 1, 2, ... begin."""

    def stage_of(interval: int) -> int:
        return sum(interval >= cut for cut in cuts)

    stages: dict[str, set[int]] = defaultdict(set)
    for interval, used in enumerate(trace.parameters):
        for name in used:
            stages[name].add(stage_of(interval))
    units = {
        name: stage_of(number)
        for number, name in enumerate(trace.units, start=1)
        if trace.units.count(name) == 1  # one that is called in several places is computed in each
    }
    inside = {
        f"{unit}.{name}": stage
        for unit, stage in units.items()
        for name, _ in model.get_submodule(unit).named_buffers(remove_duplicate=False)
    }
    written = {name: stage_of(interval) for name, (interval, _) in trace.written.items()}
    names = [name for name, _ in model.named_buffers()]
    return Cut(
        firsts=tuple(trace.units[cut - 1] for cut in cuts),
        units=units,
        parameters={name: tuple(sorted(stages[name])) or (0,) for name, _ in model.named_parameters()},
        buffers={name: inside.get(name, written.get(name, 0)) for name in names},
        tainted=frozenset(name for name, (_, values) in trace.written.items() if values or name in inside),
    )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """What a tensor becomes that comes into a stage, or goes out of one, where not all that is computed with are plain
    tensors; and what a stage's forward runs inside of."""

    into: Callable[[Tensor], Tensor] = _as_it_is
    out: Callable[[Tensor], Tensor] = _as_it_is
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class StageEnd(BaseException):
    """Leaves the model's forward where the next stage begins. No Exception: nobody's handler is meant."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call


class _Stubbed(NamedTuple):
    """A module of which a stage has no need, and what stands in its place."""

    modules: dict[str, Any]  # its parent's
    key: str
    module: nn.Module
    stub: _Stub


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is known beforehand of a stage's forward on micro-batches of some shapes."""

    first: str  # unit; "" of the first stage
    following: str  # first unit of the next stage; "" of the last one
    entering: tuple[Crossing, ...]
    leaving: tuple[Crossing, ...]
    units: list[_Stubbed]
    leaves: list[_Stubbed]  # until the first unit is entered


class _Entering(NamedTuple):
    """What waits for the first unit of the stage that is computed."""

    part: _Part
    given: Sequence[Tensor]
    seed: int | None


class StagedModel:
    """`stages`: this rank's. Takes the values of all other parameters away from `model`; those would be on `device`."""

    def __init__(
        self, model: nn.Module, cut: Cut, stages: Sequence[int], device: torch.device, border: Border | None = None
    ) -> None:
        self.model = model
        self.cut = cut
        self.stages = tuple(stages)
        self._border = border or Border()
        self._entering: _Entering | None = None
        _empty(model, cut, self.stages, device)
        self._parts: dict[tuple[int, Shapes], _Part] = {}
        for stage in self.stages:
            if stage:
                first = model.get_submodule(cut.firsts[stage - 1])
                first.register_forward_pre_hook(self._make_entry(cut.firsts[stage - 1]), prepend=True, with_kwargs=True)

    def holds(self, name: str) -> bool:
        """Whether a parameter's values are here."""
        return not set(self.cut.parameters[name]).isdisjoint(self.stages)

    def owns_buffer(self, name: str) -> bool:
        """Whether a buffer's values here are those that count."""
        return self.cut.buffers[name] in self.stages

    def run(
        self,
        stage: int,
        received: Sequence[Tensor],
        shapes: Shapes,
        forward: Callable[[nn.Module], Any],
        seeds: tuple[int, int] | None = None,
    ) -> Any:
        """What goes into the next stage, as a list of tensors in the order of its crossings; of the last stage, what
        the forward returned. `received`: in the order of this stage's crossings. `seeds`: for random numbers before
        the stage, which are alike on all ranks, and in it.

        Raises UsageError."""
        part = self._parts.get((stage, shapes))
        if part is None:  # once: to look all of it up for every micro-batch would take longer than the calls
            part = self._parts[stage, shapes] = self._part_of(stage, shapes)
        self._entering = _Entering(part, [self._border.into(tensor) for tensor in received], seeds and seeds[1])
        if seeds:
            seed_torch(seeds[0])
        try:
            with _stubbed(part), self._border.around():
                output = forward(self.model)
        except StageEnd as end:
            return [self._border.out(tensor) for tensor in _leaving(part, end.call)]
        except NeedsValues as error:
            raise UsageError(f"strategy.pipeline: stage {stage} can't be computed on its own: {error}") from error
        finally:
            self._entering = None
        if part.following:
            raise UsageError(
                f"strategy.pipeline: the forward did not come to {part.following}, where stage {stage + 1} begins"
            )
        if any(isinstance(tensor, Absent) for tensor in tensors_in(output)):
            raise UsageError(_other_way("what the model returns"))
        return output

    def _part_of(self, stage: int, shapes: Shapes) -> _Part:
        first = self.cut.firsts[stage - 1] if stage else ""
        following = self.cut.firsts[stage] if stage < len(self.cut.firsts) else ""

        def stubbed(name: str) -> _Stubbed:
            parent, key = _place(self.model, name)
            module = parent.get_submodule(key)
            return _Stubbed(parent._modules, key, module, _Stub(module, shapes.outputs.get(name), name == following))

        return _Part(
            first=first,
            following=following,
            entering=shapes.crossings[first] if first else (),
            leaving=shapes.crossings[following] if following else (),
            units=[stubbed(name) for name, at in self.cut.units.items() if at != stage],
            leaves=[stubbed(name) for name, at in shapes.leaves.items() if at < stage and _is_bare(self.model, name)],
        )

    def _make_entry(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._entering is None or self._entering.part.first != name:
                return None
            part, given, seed = self._entering
            if seed is not None:
                seed_torch(seed)
            for stubbed in part.leaves:
                stubbed.modules[stubbed.key] = stubbed.module
            leaves, put_together = _taken_apart((args, kwargs))
            for crossing, tensor in zip(part.entering, given, strict=True):
                if crossing.position < len(leaves):
                    leaves[crossing.position] = tensor.clone() if crossing.written else tensor
            if any(_is_missing(leaf) for leaf in leaves):
                raise UsageError(_other_way(f"what {name} is called with"))
            return put_together(leaves)

        return enter


@contextlib.contextmanager
def _stubbed(part: _Part) -> Iterator[None]:
    """For the time of a forward."""
    for modules, key, _, stub in (*part.units, *part.leaves):
        modules[key] = stub
    try:
        yield
    finally:
        for modules, key, module, _ in (*part.units, *part.leaves):
            modules[key] = module


class _Stub:
    """In the place of a unit that is not to be computed here; its attributes are the unit's, and its class."""

    def __init__(self, instead_of: nn.Module, output: Any, ends: bool) -> None:
        self._instead_of = instead_of
        self._output = output
        self._ends = ends

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._instead_of)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._ends:
            raise StageEnd((args, kwargs))
        if isinstance(self._output, Absent):  # what else there is to do for a call of a module takes longer
            return self._output.fresh()
        return tree_map_only(Absent, Absent.fresh, self._output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._instead_of, name)


def _is_bare(model: nn.Module, name: str) -> bool:
    """Whether nobody waits for the module to be called."""
    module = model.get_submodule(name)
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks)


_LEAVES = (Tensor, bool, int, float, str, type(None))


def _taken_apart(call: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Leaves of a call, (args, kwargs), and what makes a call of such leaves. Most have nothing but tensors, by
    position: torch's way with any structure takes several times as long, and this is done for every micro-batch."""
    args, kwargs = call
    if not kwargs and all(isinstance(arg, _LEAVES) for arg in args):
        return list(args), lambda leaves: (tuple(leaves), {})
    found, structure = tree_flatten(call)
    return found, lambda leaves: tree_unflatten(leaves, structure)


def _is_missing(leaf: object) -> bool:
    return isinstance(leaf, Absent) and not isinstance(leaf, nn.Parameter)


def _other_way(what: str) -> str:
    return (
        f"strategy.pipeline: {what} depends on something that was computed in an earlier stage and is not among the "
        "arguments with which this stage's first unit is called. Set strategy.pipeline_split so that no such value "
        "crosses a border of stages"
    )


def _leaving(part: _Part, call: Any) -> list[Tensor]:
    """What crosses over, of the call of the next stage's first unit. Raises UsageError where it is not as expected."""
    leaves, _ = _taken_apart(call)
    sent = []
    for crossing in part.leaving:
        found = leaves[crossing.position] if crossing.position < len(leaves) else None
        if not isinstance(found, Tensor) or _is_missing(found):
            raise UsageError(_other_way(f"what {part.following} is called with"))
        if found.shape != crossing.shape or found.dtype != crossing.dtype:
            raise UsageError(
                f"strategy.pipeline: {part.following} gets a tensor of {found.dtype} {tuple(found.shape)}, where the "
                f"batch's shapes let expect {crossing.dtype} {crossing.shape}: it depends on the batch's values"
            )
        sent.append(found)
    return sent


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return model.get_submodule(parent), key


def _empty(model: nn.Module, cut: Cut, stages: Sequence[int], device: torch.device) -> None:
    """In place; a parameter under several names stays one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    buffers = {id(buffer): name for name, buffer in model.named_buffers()}
    absent: dict[int, Tensor] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if set(cut.parameters[names[id(parameter)]]).isdisjoint(stages):
                if id(parameter) not in absent:
                    absent[id(parameter)] = absent_like(parameter, device)
                module._parameters[key] = absent[id(parameter)]  # type: ignore[assignment]
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = buffers[id(buffer)]
            if name in cut.tainted and cut.buffers[name] not in stages:
                if id(buffer) not in absent:
                    absent[id(buffer)] = absent_like(buffer, device)
                module._buffers[key] = absent[id(buffer)]
