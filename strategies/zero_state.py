"""ZeRO's partitions as canonical state: boxes out of flat ranges, filled in place. No model is gathered for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.strategies.boxes import Box, Patches, TensorSpec, flat_boxes
from dtrain.strategies.protocol import Local, Reader, Saved
from dtrain.strategies.state import DTYPES, check_fit, describe, make_optimizer_state, persistent_buffers
from dtrain.strategies.zero_partitions import Range, Slice, boxes_of


class ZeroState:
    """`publish` spreads the master weights to the model's parameters on all ranks."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        slices: Sequence[Slice],
        world_size: int,
        publish: Callable[[], None],
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._slices = {one.parameter: one for one in slices}
        self._world_size = world_size
        self._publish = publish

    def canonical(self) -> tuple[list[TensorSpec], Local, dict[str, dict[str, Any]]]:
        specs: list[TensorSpec] = []
        local: Local = {}
        for name, tensor, one in self._named_tensors():
            if one is not None and tensor.shape == one.mine.shape:
                spec, local[name] = _describe_slice(name, tensor, one)
            else:
                spec, local[name] = describe(name, tensor, self._world_size)
            specs.append(spec)
        values = {name: plain for name, state in self._states() if (plain := _plain(state))}
        return specs, local, values

    def load(self, saved: Saved, values: Mapping[str, Mapping[str, Any]], read: Reader) -> None:
        names = {self._held(parameter): name for name, parameter in self._model.named_parameters()}
        slices = {one.mine: one for one in self._slices.values()}

        def empty(held: nn.Parameter, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
            one = slices.get(held)
            whole = one.shape if one else tuple(held.shape)
            if shape == whole and key != "step":
                return torch.zeros_like(held, dtype=dtype)
            return torch.zeros(shape, dtype=dtype)

        make_optimizer_state(names, self._optimizer, saved, values, empty)
        specs, local, _ = self.canonical()
        check_fit(specs, saved)
        read(specs, ((name, box, tensor) for name, boxes in local.items() for box, tensor in boxes if box.num_elements))
        self._publish()

    def written(self) -> None:
        self._publish()

    def _named_tensors(self) -> Iterator[tuple[str, Tensor, Slice | None]]:
        for name, parameter in self._model.named_parameters():
            yield f"model.{name}", self._held(parameter).detach(), self._slices.get(parameter)
        for name, buffer in persistent_buffers(self._model):
            yield f"model.{name}", buffer, None
        for name, parameter in self._model.named_parameters():
            for key, value in sorted(self._optimizer.state.get(self._held(parameter), {}).items()):
                if isinstance(value, Tensor):
                    yield f"optim.{name}.{key}", value, self._slices.get(parameter)

    def _states(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for name, parameter in self._model.named_parameters():
            yield name, self._optimizer.state.get(self._held(parameter), {})

    def _held(self, parameter: nn.Parameter) -> nn.Parameter:
        one = self._slices.get(parameter)
        return one.mine if one else parameter


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def _describe_slice(name: str, tensor: Tensor, one: Slice) -> tuple[TensorSpec, list[tuple[Box, Tensor]]]:
    """`tensor`: (end - begin,), laid out as this rank's range is."""
    spec = TensorSpec(name=name, dtype=DTYPES[tensor.dtype], shape=one.shape, layout=_patches(one.shape, one.ranges))
    return spec, boxes_of(tensor, one)


@cache  # one object for a parameter and its optimizer state: planning remembers what it knows of a layout
def _patches(shape: tuple[int, ...], ranges: tuple[Range, ...]) -> Patches:
    return Patches(tuple((box, (rank,)) for rank, span in enumerate(ranges) for box in flat_boxes(shape, *span)))
