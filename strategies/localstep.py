"""An optimizer's step on what this rank holds of DTensors, instead of on DTensors: where the update is elementwise the
numbers are the same, and torch need not ask for each operation on each parameter how it is cut.

Parameters and state stay DTensors for everybody else: the local tensors are views of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.strategies.elementwise import is_elementwise
from dtrain.strategies.placement import local_part


def step_of(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """How it is stepped best. An update that is not known to be elementwise may want norms, of whole tensors: it works
    on DTensors, which give them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = any(isinstance(parameter, DTensor) for parameter in parameters)
    return LocalStep(optimizer) if cut and is_elementwise(type(optimizer)) else optimizer.step


class LocalStep:
    """A call is one step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._held: dict[int, nn.Parameter] = {}  # id of a DTensor -> the parameter that is its local tensor
        self._state: dict[Tensor, dict[str, Any]] = {}  # of the local tensors
        self._shown: dict[int, dict[str, Any]] = {}  # id of a DTensor -> what its own state shows of that
        self._seen: object = None  # the optimizer's state that these belong to; loading puts another one there

    def __call__(self) -> None:
        optimizer, state = self._optimizer, self._optimizer.state
        if self._seen is not state:
            self._take(state)
        groups = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [self._with_gradient(parameter) for parameter in group["params"]]
        optimizer.state = self._state  # type: ignore[assignment]  # torch says defaultdict, which it is
        try:
            optimizer.step()
        finally:
            optimizer.state = state
            for group, parameters in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = parameters
        for parameter in (parameter for parameters in groups for parameter in parameters):
            self._show(parameter)

    @torch.no_grad()
    def _take(self, state: Any) -> None:
        self._seen, self._state, self._shown = state, defaultdict(dict), {}
        for parameter, entry in list(state.items()):
            if isinstance(parameter, DTensor):
                mine = {k: local_part(v) if isinstance(v, Tensor) else v for k, v in entry.items()}
                self._state[self._local(parameter)], self._shown[id(parameter)] = mine, dict(mine)
            else:
                self._state[parameter] = entry

    @torch.no_grad()
    def _with_gradient(self, parameter: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor):
            return parameter
        local, gradient = self._local(parameter), parameter.grad
        local.grad = None if gradient is None else local_part(gradient)
        return local

    def _local(self, parameter: DTensor) -> nn.Parameter:
        tensor = parameter.to_local().detach()
        local = self._held.get(id(parameter))
        if local is None:
            local = self._held[id(parameter)] = nn.Parameter(tensor)
        elif local.data_ptr() != tensor.data_ptr():  # it was moved
            local.data = tensor
        return local

    def _show(self, parameter: Tensor) -> None:
        """In the state of a DTensor, what has become another object: tensors that were written to are seen already."""
        if not isinstance(parameter, DTensor):
            if parameter in self._state:
                self._optimizer.state[parameter] = self._state[parameter]
            return
        local = self._held[id(parameter)]
        local.grad = None
        shown = self._shown.setdefault(id(parameter), {})
        for key, value in self._state.get(local, {}).items():
            if key not in shown or shown[key] is not value:
                shown[key] = value
                self._optimizer.state[parameter][key] = _as_dtensor(key, value, parameter)


def _as_dtensor(key: str, value: Any, like: DTensor) -> Any:
    if not isinstance(value, Tensor) or key == "step" or value.shape != like.to_local().shape:
        return value
    return DTensor.from_local(
        value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
