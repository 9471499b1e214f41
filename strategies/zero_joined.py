"""One of ZeRO's partitions as the user's optimizer steps it: as one tensor, whichever parameters' elements lie in it.
Elementwise updates give the same numbers as a step for each parameter, in less time.

The optimizer's state stays one for each parameter, of views: what is saved and loaded knows nothing of this.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.strategies.elementwise import is_elementwise
from dtrain.strategies.zero_partitions import Slice

# Of the partition's size, while torch's Adam steps it as one tensor: a root, and what it is divided by.
UPDATE_TEMPORARIES = 2


class JoinedStep:
    """A parameter without a gradient must keep its value and its state, and states may differ by parameter (one that
    was left out before has taken fewer steps): then each takes its own step."""

    def __init__(self, optimizer: torch.optim.Optimizer, flat: Tensor, slices: Sequence[Slice]) -> None:
        """`slices`: all that lie in `flat`, of one of the optimizer's groups."""
        self._optimizer = optimizer
        self._joinable = is_elementwise(type(optimizer)) is True
        self._slices = tuple(slices)
        self._whole = nn.Parameter(flat.detach())
        (self._group,) = (
            number
            for number, group in enumerate(optimizer.param_groups)
            if any(held is slices[0].mine for held in group["params"])
        )
        self._state: dict[str, Any] = {}  # of the whole
        self._shown: dict[str, Any] = {}  # what of it the slices' states show
        self._seen: object = None  # the optimizer's state that these belong to; loading puts another one there

    def step(self, gradient: Tensor, unused: AbstractSet[nn.Parameter]) -> None:
        """`gradient`: of the whole partition; `unused`: parameters that have none."""
        if any(one.parameter in unused for one in self._slices if unused) or not self._join():
            self._part()
            self._step_each(unused)
        else:
            self._step_whole(gradient)

    def _step_whole(self, gradient: Tensor) -> None:
        groups, state = self._optimizer.param_groups, self._optimizer.state
        held = [group["params"] for group in groups]
        for number, group in enumerate(groups):
            group["params"] = [self._whole] if number == self._group else []
        self._whole.grad = gradient
        state[self._whole] = self._state
        try:
            self._optimizer.step()
        finally:
            self._state = state.pop(self._whole)
            self._whole.grad = None
            for group, parameters in zip(groups, held, strict=True):
                group["params"] = parameters
        self._show()

    def _step_each(self, unused: AbstractSet[nn.Parameter]) -> None:
        for one in self._slices:
            one.mine.grad = None if one.parameter in unused else one.gradient
        self._optimizer.step()
        for one in self._slices:
            one.mine.grad = None

    def _join(self) -> bool:
        """Whether the slices' states are one."""
        state = self._optimizer.state
        if not self._joinable:
            return False
        if self._seen is not state:
            joined = _joined([state.get(one.mine, {}) for one in self._slices], self._slices, self._whole)
            if joined is None:
                return False
            self._state, self._shown, self._seen = joined, {}, state
            for one in self._slices:
                state[one.mine] = {}
            self._show()
        return True

    def _show(self) -> None:
        """In the slices' states, what has become another object: tensors that were written to are seen already."""
        for key, value in self._state.items():
            if key not in self._shown or self._shown[key] is not value:
                self._shown[key] = value
                for one in self._slices:
                    self._optimizer.state[one.mine][key] = self._part_of(value, one)

    def _part_of(self, value: Any, one: Slice) -> Any:
        if isinstance(value, Tensor) and value.shape == self._whole.shape:
            return value.narrow(0, one.offset, one.mine.numel())
        return value

    def _part(self) -> None:
        """What all slices share (how many steps were taken) becomes each one's own."""
        if self._seen is not self._optimizer.state:
            return
        for one in self._slices:
            held = self._optimizer.state[one.mine]
            held.update({key: copy.deepcopy(value) for key, value in held.items() if value is self._shown[key]})
        self._state, self._shown, self._seen = {}, {}, None


def _joined(states: Sequence[Mapping[str, Any]], slices: Sequence[Slice], whole: Tensor) -> dict[str, Any] | None:
    """One state for all; None where they differ. What lies between slices, padding, is 0."""
    first = states[0]
    if any(state.keys() != first.keys() for state in states):
        return None
    cut = {key for key in first if all(_is_cut(s[key], one) for s, one in zip(states, slices, strict=True))}
    if not all(_equal(state[key], first[key]) for key in first.keys() - cut for state in states):
        return None
    joined = dict(first)
    for key in cut:
        joined[key] = torch.zeros_like(whole, dtype=first[key].dtype, requires_grad=False)
        for state, one in zip(states, slices, strict=True):
            joined[key].narrow(0, one.offset, one.mine.numel()).copy_(state[key])
    return joined


def _is_cut(value: Any, one: Slice) -> bool:
    return isinstance(value, Tensor) and value.shape == one.mine.shape


def _equal(value: Any, other: Any) -> bool:
    """Of others than tensors and plain values it is not known, so they count as different."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    plain = bool | int | float | str | None
    return isinstance(value, plain) and isinstance(other, plain) and value == other
