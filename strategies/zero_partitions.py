"""Which elements of which parameter lie on which rank under ZeRO, and the views of them that the optimizer works on.

DeepSpeed flattens: stages 1 and 2 the parameters of an optimizer group one after another, cut over the ranks wherever
that falls; stage 3 each parameter alone, in equal parts. Padding is in nobody's range, so it never leaves. What is read
here DeepSpeed does not promise to keep: zero_check.py tries it out at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.strategies.boxes import Box, flat_boxes

Range = tuple[int, int]  # of a parameter's elements in row-major order; empty where both are equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One parameter, and this rank's elements of it."""

    name: str
    shape: tuple[int, ...]
    parameter: nn.Parameter  # the model's; under stage 3 empty but for the moments when it is gathered
    ranges: tuple[Range, ...]  # one a rank
    rank: int
    mine: nn.Parameter  # (end - begin,) of this rank's range: a view of the master weights
    flat: Tensor | None  # DeepSpeed's partition that `mine` lies in; None for what is not trained
    offset: int  # where in it

    @property
    def range(self) -> Range:
        return self.ranges[self.rank]

    @property
    def gradient(self) -> Tensor:
        """(end - begin,): a view of the partition's gradient."""
        assert self.flat is not None
        assert self.flat.grad is not None
        return self.flat.grad.narrow(0, self.offset, self.mine.numel())


def find_slices(model: nn.Module, zero: Any, stage: int, rank: int, world_size: int) -> list[Slice]:
    """Of every parameter that ZeRO has cut, in the model's order. `zero`: DeepSpeed's optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = _whole_slices(zero, names, rank, world_size) if stage == 3 else _flat_slices(zero, names, rank, world_size)
    slices = {one.parameter: one for one in found}
    return [slices[parameter] for parameter in names if parameter in slices]


def _flat_slices(zero: Any, names: dict[nn.Parameter, str], rank: int, world_size: int) -> Iterator[Slice]:
    """Stages 1 and 2."""
    groups = zip(
        zero.round_robin_bit16_groups,
        zero.round_robin_bit16_offsets,
        zero.partition_size,
        zero.single_partition_of_fp32_groups,
        strict=True,
    )
    for parameters, begins, partition_size, flat in groups:
        size = int(partition_size)
        for parameter, begin in zip(parameters, begins, strict=True):
            end = begin + parameter.numel()
            ranges = tuple(_clipped(begin, end, size * r, size * (r + 1)) for r in range(world_size))
            offset = max(0, begin - size * rank) if ranges[rank][0] < ranges[rank][1] else 0
            yield _trained(names[parameter], tuple(parameter.shape), parameter, ranges, rank, flat, offset)


def _whole_slices(zero: Any, names: dict[nn.Parameter, str], rank: int, world_size: int) -> Iterator[Slice]:
    """Stage 3: parameters that are not trained are cut as well."""
    trained = {}
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            trained[parameter] = (flat, offset)
            offset += parameter.partition_numel()
    for parameter, name in names.items():
        size, total, shape = parameter.partition_numel(), parameter.ds_numel, tuple(parameter.ds_shape)  # type: ignore[attr-defined]
        ranges = tuple(_clipped(0, total, size * r, size * (r + 1)) for r in range(world_size))
        if parameter in trained:
            yield _trained(name, shape, parameter, ranges, rank, *trained[parameter])
        else:
            held = parameter.ds_tensor.detach().narrow(0, 0, ranges[rank][1] - ranges[rank][0])  # type: ignore[attr-defined]
            mine = nn.Parameter(held, requires_grad=False)
            yield Slice(
                name=name, shape=shape, parameter=parameter, ranges=ranges, rank=rank, mine=mine, flat=None, offset=0
            )


def _clipped(begin: int, end: int, low: int, high: int) -> Range:
    """What of [begin, end) lies in [low, high), counted from `begin`."""
    first = min(max(begin, low), end)
    return first - begin, max(first, min(end, high)) - begin


def _trained(
    name: str,
    shape: tuple[int, ...],
    parameter: nn.Parameter,
    ranges: tuple[Range, ...],
    rank: int,
    flat: Tensor,
    offset: int,
) -> Slice:
    begin, end = ranges[rank]
    mine = nn.Parameter(flat.detach().narrow(0, offset, end - begin))
    return Slice(
        name=name, shape=shape, parameter=parameter, ranges=ranges, rank=rank, mine=mine, flat=flat, offset=offset
    )


def boxes_of(tensor: Tensor, one: Slice) -> list[tuple[Box, Tensor]]:
    """`tensor`: (end - begin,), laid out as this rank's range is."""
    boxes = flat_boxes(one.shape, *one.range)
    parts = torch.split(tensor, [box.num_elements for box in boxes])
    return [(box, part.view(box.shape)) for box, part in zip(boxes, parts, strict=True)]


def take_slices(optimizer: torch.optim.Optimizer, slices: Iterable[Slice]) -> None:
    """The user's optimizer, built on the whole parameters, works on this rank's elements of them from now on: in the
    same groups, with what it has made at its construction (Adagrad's sums) cut alike."""
    by_parameter = {one.parameter: one for one in slices}
    for group in optimizer.param_groups:
        group["params"] = [by_parameter[p].mine if p in by_parameter else p for p in group["params"]]
    for parameter, one in by_parameter.items():
        state = optimizer.state.pop(parameter, None)
        if state is not None:
            cut = {key: value if key == "step" else _cut(value, one) for key, value in state.items()}
            optimizer.state[one.mine] = cut


def _cut(value: Any, one: Slice) -> Any:
    if not isinstance(value, Tensor) or tuple(value.shape) != one.shape:
        return value
    begin, end = one.range
    return value.reshape(-1)[begin:end].clone()


def publisher(zero: Any, stage: int) -> Callable[[], None]:
    """What spreads the master weights to the model's parameters on all ranks, as the end of DeepSpeed's step does.
    Collective."""

    @torch.no_grad()
    def publish_whole() -> None:
        zero._partition_all_parameters()
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    return publish_whole if stage == 3 else zero.update_lp_params


def gathered(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """A context in which a parameter of stage 3 is whole on every rank. Collective."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    context: AbstractContextManager[object] = GatheredParameters([parameter])
    return context
