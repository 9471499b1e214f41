"""Building a model that no rank could hold: large tensors exist on paper only (torch's meta device) until each rank
takes its part of them, and have the very bits that building the whole model would have given them.

While the model's own constructor runs, each operation on a large tensor is noted instead of done, with the state of the
random numbers where it draws some (which are drawn once, into a buffer that is thrown away, so that all that comes
after draws what it always would). Later a tensor's value is made by doing its operations again, one tensor at a time.
Small tensors are real from the beginning, and whoever reads a large one while the model is built gets its value.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dtrain.strategies.absent import is_absent
from dtrain.strategies.boxes import whole
from dtrain.strategies.protocol import Wrapped

LARGE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A tensor on paper: where it lies in a storage, as that storage was after the operation `last`."""

    paper: _Paper
    last: _Note
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Note:
    """One operation. Tensors on paper stand in `args` and `kwargs` as _View. `before`: the operation on the same
    storage that it needs; None where it makes the storage, or leaves nothing of what was there."""

    func: Any
    args: Any
    kwargs: Any
    random: Tensor | None  # state of the generator before it
    makes: bool  # its output is the storage; otherwise it writes into it
    before: _Note | None


@dataclass(slots=True, eq=False)
class _Paper:
    """A storage on paper, as it is now."""

    storage: torch.UntypedStorage  # held, so that no other one is taken for it
    last: _Note


class Deferred:
    """A context manager around the model's construction; afterwards value() gives the tensors of that model."""

    def __init__(self, large_bytes: int = LARGE_BYTES) -> None:
        self._large_bytes = large_bytes
        self._papers: dict[int, _Paper] = {}
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> Deferred:
        self._modes.enter_context(_Noting(self))
        self._modes.enter_context(_Pretending(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._modes.close()

    def is_paper(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self._view(value) is not None

    def value(self, tensor: Tensor) -> Tensor:
        """What `tensor` would hold: of a tensor on paper a new one, on CPU; any other as it is."""
        view = self._view(tensor)
        return tensor.detach() if view is None else _value(view)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of the constructor: noted, or done."""
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        views = [view for view in map(self._view, inputs) if view is not None]
        if not views:
            return self._begin(func, args, kwargs) if not inputs else func(*args, **kwargs)
        written = list(_written(func, args, kwargs))
        if func.is_view and not written:
            return func(*args, **kwargs)  # on paper still: another part of the same storage
        if all(self._view(tensor) for tensor in written):
            found = self._note(func, args, kwargs, written)
            if found is not None:
                return found
        real = tree_map(self._real, (args, kwargs))
        found = func(*real[0], **real[1])
        pairs = list(zip(written, _written(func, *real), strict=True))
        for tensor, value in pairs:
            if self.is_paper(tensor):  # one of several that are written to at once, as torch._foreach_mul_ does
                self._note(torch.ops.aten.copy_.default, (tensor, value), {}, [tensor])
        stands_for = {id(value): tensor for tensor, value in pairs}
        found = tree_map(lambda leaf: stands_for.get(id(leaf), leaf), found)
        del real, pairs
        _give_back()
        return found

    def _begin(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor from nothing. A large one begins on paper."""
        device = torch.device(kwargs.get("device") or "cpu").type
        if device not in ("cpu", "meta") or "device" not in _names(func):
            return func(*args, **kwargs)
        sketch = func(*args, **{**kwargs, "device": "meta"})
        # torch itself makes a number that is put into a tensor on paper on the meta device.
        if device == "cpu" and not self._is_large(sketch):
            return func(*args, **kwargs)
        return self._add(func, args, kwargs, self._draw(func, args, kwargs), sketch)

    def _note(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Notes an operation on paper, where nothing small comes out of it; None where something does."""
        if not written:
            on_meta = tree_map(_on_meta, (args, kwargs))
            try:
                found = func(*on_meta[0], **on_meta[1])
            except RuntimeError:  # a number, or a shape, that only the values tell
                return None
            return (
                self._add(func, args, kwargs, self._draw(func, args, kwargs), found) if self._is_large(found) else None
            )
        if len(written) != 1:
            return None
        (target,) = written
        view = self._view(target)
        assert view is not None
        random = self._draw(func, args, kwargs)
        plain = tree_map(self._kept, (args, kwargs))
        same = sum(isinstance(leaf, _View) and leaf.paper is view.paper for leaf in tree_leaves(plain))
        before = None if same == 1 and _overwrites(func, target) else view.last
        view.paper.last = _Note(func=func, args=plain[0], kwargs=plain[1], random=random, makes=False, before=before)
        return target

    def _is_large(self, made: Any) -> bool:
        return isinstance(made, Tensor) and made.untyped_storage().nbytes() >= self._large_bytes

    def _add(self, func: Any, args: Any, kwargs: Any, random: Tensor | None, sketch: Tensor) -> Tensor:
        plain = tree_map(self._kept, (args, kwargs))
        note = _Note(func=func, args=plain[0], kwargs=plain[1], random=random, makes=True, before=None)
        storage = sketch.untyped_storage()
        self._papers[storage._cdata] = _Paper(storage=storage, last=note)
        return sketch

    def _draw(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The generator's state; afterwards it has moved on as if the operation had been done."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        generator = kwargs.get("generator") or torch.default_generator
        state = generator.get_state()
        blank = tree_map(lambda leaf: _blank(leaf) if self.is_paper(leaf) else _on_cpu(leaf), (args, kwargs))
        func(*blank[0], **blank[1])
        del blank
        _give_back()
        return state

    def _view(self, tensor: Tensor) -> _View | None:
        paper = self._papers.get(tensor.untyped_storage()._cdata)
        if paper is None:
            return None
        return _View(
            paper=paper,
            last=paper.last,
            dtype=tensor.dtype,
            size=tuple(tensor.shape),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
        )

    def _kept(self, leaf: Any) -> Any:
        """An argument as it is now: a tensor that exists may change before it is needed."""
        if not isinstance(leaf, Tensor):
            return _on_cpu(leaf)
        return self._view(leaf) or leaf.detach().clone()

    def _real(self, leaf: Any) -> Any:
        return self.value(leaf) if isinstance(leaf, Tensor) else _on_cpu(leaf)


class _Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, deferred: Deferred) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._deferred = deferred

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._deferred.run(func, args, kwargs or {})


class _Pretending(TorchFunctionMode):
    """Tensors on paper look as if they lay on the CPU: initializers leave meta tensors out."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKS and self._deferred.is_paper(args[0]):
            return _LOOKS[func]
        return func(*args, **(kwargs or {}))


_tensor: Any = Tensor
_LOOKS = {_tensor.is_meta.__get__: False, _tensor.device.__get__: torch.device("cpu")}


def _value(view: _View) -> Tensor:
    """Does the operations again. What they need of other tensors is made on the way, and kept no longer."""
    notes: list[_Note] = []
    note: _Note | None = view.last
    while note is not None:
        notes.append(note)
        note = note.before
    storage = torch.empty(view.paper.storage.nbytes(), dtype=torch.uint8).untyped_storage()
    for note in reversed(notes):
        argument = partial(_argument, paper=view.paper, storage=storage)
        args, kwargs = tree_map(argument, (note.args, note.kwargs))
        found = _with_random(note.random, kwargs.get("generator"), note.func, args, kwargs)
        if note.makes:
            storage = found.untyped_storage()
    return _part(view, storage)


def _argument(leaf: Any, paper: _Paper, storage: torch.UntypedStorage) -> Any:
    if not isinstance(leaf, _View):
        return leaf
    return _part(leaf, storage) if leaf.paper is paper else _value(leaf)


def _part(view: _View, storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=view.dtype).set_(storage, view.offset, view.size, view.stride)


def _with_random(state: Tensor | None, generator: torch.Generator | None, func: Any, args: Any, kwargs: Any) -> Any:
    if state is None:
        return func(*args, **kwargs)
    drawn = generator or torch.default_generator
    before = drawn.get_state()
    try:
        drawn.set_state(state)
        return func(*args, **kwargs)
    finally:
        drawn.set_state(before)


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Generator):
        return None
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _on_cpu(leaf: Any) -> Any:
    """Where a tensor on paper is said to lie, when an operation names the device of another tensor."""
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf


def _names(func: Any) -> set[str]:
    return {argument.name for argument in func._schema.arguments}


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


_FILLING = ("normal_", "uniform_", "fill_", "zero_", "copy_", "exponential_", "random_", "bernoulli_")


def _overwrites(func: Any, target: Tensor) -> bool:
    """Whether nothing of what the storage held is left, whatever the arguments are."""
    whole = target.numel() * target.element_size() == target.untyped_storage().nbytes()
    return whole and target.is_contiguous() and func.overloadpacket.__name__ in _FILLING


def _blank(tensor: Tensor) -> Tensor:
    """Memory to draw into."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _give_back() -> None:
    """Freed memory between what is still in use goes back to the system: glibc keeps it otherwise, layer by layer as
    much as the whole model."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def place(model: nn.Module, device: torch.device) -> None:
    """Moves a model to where it computes. One on paper gets memory there; what is in it, Initial.fill() says."""
    if not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        model.to(device)
        return
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, ties hold
    try:
        model.to_empty(device=device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class Initial:
    """What a model on paper begins with, by the names of its tensors. To be taken before it is spread over ranks."""

    def __init__(self, deferred: Deferred, model: nn.Module) -> None:
        self._deferred = deferred
        named = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = {name: tensor.detach() for name, tensor in named}

    def fill(self, wrapped: Wrapped) -> None:
        """Each rank makes one tensor at a time and keeps the parts that it holds."""
        _, local, _ = wrapped.state.canonical()
        for name, tensor in wrapped.module.named_buffers():
            if f"model.{name}" not in local and not is_absent(tensor):  # one that no checkpoint keeps
                tensor.copy_(self._value(name))
        with torch.no_grad():
            for name, boxes in local.items():
                if name.startswith("model."):
                    value = self._value(name.removeprefix("model."))
                    for box, tensor in boxes:
                        tensor.detach().copy_(value[box.relative_to(whole(tuple(value.shape)))])
                    del value
                    _give_back()

    def make_buffers(self, model: nn.Module) -> None:
        """For who looks at what the model's forward does before it is spread."""
        made: dict[int, Tensor] = {}
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = made.setdefault(id(buffer), self._deferred.value(buffer))

    def _value(self, name: str) -> Tensor:
        return self._deferred.value(self._tensors[name])
