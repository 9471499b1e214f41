"""A nested state of a script's own (dicts, lists, modules, optimizers, numbers) as named tensors and a JSON tree, and
back into what a script has at hand. Where the tensors' bytes come from and go to is functional.py's.

A tensor's name is its path joined by dots, so a module under the key `model` has the names of a trainer's checkpoint.
In the tree `{"$": ...}` stands for what JSON has not: a tensor, a tuple, a dict whose keys are no strings, inf and nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dtrain.cluster.errors import CheckpointError
from dtrain.runtime.checkpoint.torchtypes import TORCH_DTYPES
from dtrain.strategies.placement import local_part
from dtrain.strategies.state import DTYPES

Tree = Any  # what JSON can hold
MARK = "$"
Saved = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, global shape)


@runtime_checkable
class Stateful(Protocol):
    """A module, an optimizer, a schedule, or anything else with these two."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def flatten(state: Mapping[str, Any]) -> tuple[Tree, dict[str, Tensor]]:
    """(tree, tensors by name). A tensor that occurs twice, as tied weights do, is kept under its first name.

    Raises CheckpointError naming what can't be saved.
    """
    flattening = _Flattening()
    return flattening.value((), state), flattening.tensors


class _Flattening:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}  # memory -> name

    def value(self, path: tuple[str, ...], value: Any) -> Tree:
        match value:
            case Tensor():
                return {MARK: "tensor", "name": self._tensor(".".join(path), value.detach())}
            case Stateful():
                return self.value(path, unwrapped(value).state_dict())
            case Mapping():
                return self._mapping(path, value)
            case list() | tuple():
                items = [self.value((*path, str(index)), item) for index, item in enumerate(value)]
                return {MARK: "tuple", "items": items} if isinstance(value, tuple) else items
            case float() if not math.isfinite(value):
                return {MARK: "float", "value": str(value)}
            case bool() | int() | float() | str() | None:
                return value
        raise CheckpointError(
            f"{'.'.join(path)}: a {type(value).__name__} can't be saved. Save tensors, numbers, strings, lists, dicts, "
            "and objects with state_dict and load_state_dict"
        )

    def _mapping(self, path: tuple[str, ...], value: Mapping[Any, Any]) -> Tree:
        pairs = [(key, self.value((*path, str(key)), child)) for key, child in value.items()]
        if all(isinstance(key, str) for key in value) and MARK not in value:
            return dict(pairs)
        wrong = next((key for key in value if not isinstance(key, str | int)), None)
        if wrong is not None:
            raise CheckpointError(f"{'.'.join(path)}: the key {wrong!r} is neither text nor a whole number")
        return {MARK: "dict", "items": [list(pair) for pair in pairs]}

    def _tensor(self, name: str, tensor: Tensor) -> str:
        known = self._names.setdefault(memory(tensor), name)
        if known == name and self.tensors.setdefault(name, tensor) is not tensor:
            raise CheckpointError(f"{name}: two tensors have this name. A key that holds a dot may be to blame")
        return known


def unwrapped(value: Any) -> Any:
    """What DistributedDataParallel and torch.compile have wrapped: the names are those of the plain module."""
    while True:
        if isinstance(value, nn.parallel.DistributedDataParallel):
            value = value.module
        elif isinstance(value, nn.Module) and isinstance(inner := value._modules.get("_orig_mod"), nn.Module):
            value = inner
        else:
            return value


def memory(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements."""
    local = local_part(tensor)
    storage: Any = local.untyped_storage()  # the stubs of torch 2.13 do not know _cdata
    return storage._cdata, local.storage_offset(), tuple(tensor.shape), local.stride(), tensor.dtype


Keys = Literal["some", "all", "same", "any"]  # of the checkpoint's keys in a dict: see Filling.value


class Filling:
    """What is to be read into a script's state, found before anything is read. Then the caller fills `requests`, and
    calls `finish`, which gives objects their states and puts plain values into dicts and lists."""

    def __init__(self, saved: Saved) -> None:
        self._saved = saved
        self._after: list[Callable[[], Any]] = []
        self.requests: dict[str, Tensor] = {}
        self.problems: list[str] = []

    def finish(self) -> None:
        for act in self._after:
            act()

    def value(self, path: tuple[str, ...], tree: Tree, like: Any, keys: Keys) -> Any:
        """What stands at `path` afterwards. `like` is what stands there now: its tensors are filled in place; what has
        no place yet is made, on the CPU.

        `keys` of a dict: "some" of those in the checkpoint may be missing here, "all" of them come in, "same" ones have
        to be in both, and "any" lets the owner of the dict decide.
        """
        like = unwrapped(like)
        if isinstance(like, Stateful) and not isinstance(like, Tensor):
            self._after.append(partial(like.load_state_dict, self._inner(path, tree, like)))
            return like
        match tree:
            case {"$": "tensor"}:
                return self._tensor(".".join(path), tree["name"], like)
            case {"$": "float"}:
                return float(tree["value"])
            case {"$": "tuple"}:
                return tuple(self._items(path, tree["items"], like))
            case {"$": "dict"}:
                return self._dict(path, dict(tree["items"]), like, keys)
            case dict():
                return self._dict(path, tree, like, keys)
            case list():
                return self._items(path, tree, like)
        return tree

    def _inner(self, path: tuple[str, ...], tree: Tree, owner: Stateful) -> Any:
        """The state for an object's load_state_dict."""
        if isinstance(owner, torch.optim.Optimizer):
            return self.value(path, tree, _room_for(owner, tree, self._saved), "any")
        return self.value(path, tree, owner.state_dict(), "same" if isinstance(owner, nn.Module) else "any")

    def _dict(self, path: tuple[str, ...], tree: Mapping[Any, Tree], like: Any, keys: Keys) -> Any:
        here: Mapping[Any, Any] = like if isinstance(like, Mapping) else {}
        if keys != "any":
            self.problems += [f"{_join(path, key)}: not in the checkpoint" for key in here if key not in tree]
        if keys == "same":
            self.problems += [f"{_join(path, key)}: in the checkpoint, not here" for key in tree if key not in here]
        wanted = [key for key in tree if keys != "some" or not here or key in here]
        inner: Keys = "all" if keys == "some" else keys
        found = {key: self.value((*path, str(key)), tree[key], here.get(key), inner) for key in wanted}
        if not isinstance(like, dict):
            return found
        self._after.append(partial(like.update, found))
        return like

    def _items(self, path: tuple[str, ...], tree: Iterable[Tree], like: Any) -> list[Any]:
        here = like if isinstance(like, list | tuple) else []
        found = [
            self.value((*path, str(index)), child, here[index] if index < len(here) else None, "all")
            for index, child in enumerate(tree)
        ]
        if not isinstance(like, list):
            return found
        self._after.append(partial(like.__setitem__, slice(None), found))
        return like

    def _tensor(self, place: str, name: str, like: Any) -> Any:
        if name not in self._saved:
            self.problems.append(f"{place}: not in the checkpoint")
            return like
        dtype, shape = self._saved[name]
        target = like.detach() if isinstance(like, Tensor) else torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        if (target.dtype, tuple(target.shape)) != (TORCH_DTYPES[dtype], shape):
            here = f"{DTYPES.get(target.dtype, target.dtype)} {list(target.shape)}"
            self.problems.append(f"{place}: {dtype} {list(shape)} in the checkpoint, {here} here")
        first = self.requests.setdefault(name, target)
        if memory(first) != memory(target):  # tied when it was saved, two tensors here
            self._after.insert(0, partial(target.copy_, first))
        return like if isinstance(like, Tensor) else target


def _room_for(optimizer: torch.optim.Optimizer, tree: Tree, saved: Saved) -> dict[str, Any]:
    """The optimizer's state_dict with room for every tensor that the checkpoint has of it, laid out as its parameter is
    where the shapes agree: a new optimizer has no state yet."""
    own: dict[str, Any] = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = tree.get("state") if isinstance(tree, dict) else None
    items = state.get("items", []) if isinstance(state, dict) else []
    room: dict[int, dict[str, Tensor]] = {}
    for index, entries in items:
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            continue  # load_state_dict says what is wrong
        for key, entry in entries.items():
            if isinstance(entry, dict) and entry.get(MARK) == "tensor" and entry["name"] in saved:
                dtype, shape = saved[entry["name"]]
                if shape and shape == tuple(parameters[index].shape):
                    made = torch.zeros_like(parameters[index], dtype=TORCH_DTYPES[dtype], requires_grad=False)
                    room.setdefault(index, {})[key] = made
    return {**own, "state": room}


def _join(path: tuple[str, ...], key: Any) -> str:
    return ".".join((*path, str(key)))
