"""Update and canonical state of a model whose stages lie on different ranks: the global norm over all stages, and specs
of what other stages hold, which the ranks of a pipeline tell each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dtrain.cluster.errors import CheckpointError
from dtrain.strategies.boxes import Box, Layout, Patches, TensorSpec
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.pipelinecut import StagedModel
from dtrain.strategies.placement import first_copies
from dtrain.strategies.protocol import AllReduce, Local, Lying, Reader, Saved
from dtrain.strategies.state import canonical_state, check_fit, empty_state, make_optimizer_state
from dtrain.strategies.telling import gather_texts
from dtrain.strategies.update import OwnGradients


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGradients:
    """Keeps protocol.Update, for gradients of which each stage holds its own."""

    own: OwnGradients
    counted: Sequence[nn.Parameter]  # by this rank; others that it shares are an earlier rank's
    first: bool  # whether this rank counts what all copies of its stage hold alike

    def norm(self, all_reduce: AllReduce) -> float:
        gradients = [gradient for parameter in self.counted if (gradient := parameter.grad) is not None]
        counted = [gradient for gradient in gradients if self.first and not isinstance(gradient, DTensor)]
        cut = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        counted += [gradient.to_local() for gradient, mine in zip(cut, first_copies(cut), strict=True) if mine]
        local = float(torch.nn.utils.get_total_norm(counted)) if counted else 0.0
        (square,) = all_reduce([local * local])
        return math.sqrt(square)

    def gradients(self, module: nn.Module) -> Iterator[Lying]:
        return self.own.gradients(module)

    def apply(self, factor: float) -> None:
        self.own.apply(factor)


@dataclass(slots=True, kw_only=True)
class StageState:
    """Keeps protocol.State."""

    staged: StagedModel
    optimizer: torch.optim.Optimizer
    degrees: Degrees
    global_rank: int
    group: dist.ProcessGroup  # the ranks of this pipeline
    said: str = ""
    heard: _Heard | None = None

    def canonical(self) -> tuple[list[TensorSpec], Local, dict[str, dict[str, Any]]]:
        """As State has it, but collective over the ranks of the pipeline."""
        mine, local, values = self._own()
        said = json.dumps({"specs": encode(mine), "values": values})
        changed = torch.tensor(int(said != self.said or self.heard is None))
        dist.all_reduce(changed, group=self.group)
        if changed or self.heard is None:
            self.heard = _hear(gather_texts(said, self.group))
            self.said = said
        return self.heard.specs, local, self.heard.values

    def load(self, saved: Saved, values: Mapping[str, Mapping[str, Any]], read: Reader) -> None:
        names = {parameter: name for name, parameter in self.staged.model.named_parameters()}
        make_optimizer_state(names, self.optimizer, saved, values, empty_state)
        specs, local, _ = self.canonical()
        check_fit(specs, saved)
        read(specs, [(name, box, t) for name, boxes in local.items() for box, t in boxes if box.num_elements])

    def written(self) -> None:
        pass

    def _own(self) -> tuple[list[TensorSpec], Local, dict[str, dict[str, Any]]]:
        """Specs of what this rank holds and what counts; its boxes are more: every stage computes with a copy of its
        own of a buffer that no unit has, which is filled when state is loaded."""
        everybody = tuple(range(self.degrees.world_size))
        holders = self.degrees.peers(self.global_rank, ("replicate", "shard", "tensor"))
        specs, local, values = canonical_state(self.staged.model, self.optimizer, self.degrees.world_size)
        foreign = {f"model.{name}" for name in self.staged.cut.buffers if not self.staged.owns_buffer(name)}
        mine = [
            replace(spec, layout=_held_by(len(spec.shape), holders)) if spec.layout.holders == everybody else spec
            for spec in specs
            if spec.name not in foreign
        ]
        return mine, local, values


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heard:
    specs: list[TensorSpec]
    values: dict[str, dict[str, Any]]


def _hear(texts: Sequence[str]) -> _Heard:
    """What all ranks of a pipeline hold, of what each of them says."""
    parts = [json.loads(text) for text in texts]
    found: dict[str, TensorSpec] = {}
    for part in parts:
        for spec in decode(part["specs"]):
            found[spec.name] = _together(found[spec.name], spec) if spec.name in found else spec
    return _Heard(
        specs=list(found.values()), values={name: plain for part in parts for name, plain in part["values"].items()}
    )


def _together(one: TensorSpec, other: TensorSpec) -> TensorSpec:
    """A tensor that two stages hold, cut alike in both."""
    match one.layout, other.layout:
        case Layout(), Layout():
            pairs = zip(one.layout.owners, other.layout.owners, strict=True)
            return replace(one, layout=Layout(one.layout.parts, tuple(tuple(sorted({*a, *b})) for a, b in pairs)))
        case Patches(), Patches():
            there = dict(other.layout.boxes)
            boxes = tuple((box, tuple(sorted({*owners, *there[box]}))) for box, owners in one.layout.boxes)
            return replace(one, layout=Patches(boxes))
    raise CheckpointError(f"{one.name}: two stages cut it in different ways")


@cache
def _held_by(num_dims: int, ranks: tuple[int, ...]) -> Layout:
    return Layout((1,) * num_dims, (ranks,))


def encode(specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """As JSON; a layout that many tensors have is there once."""
    numbers: dict[Layout | Patches, int] = {}
    tensors = [[s.name, s.dtype, s.shape, numbers.setdefault(s.layout, len(numbers))] for s in specs]
    return {"layouts": [_encoded(layout) for layout in numbers], "tensors": tensors}


def _encoded(layout: Layout | Patches) -> dict[str, Any]:
    if isinstance(layout, Layout):
        return {"parts": layout.parts, "owners": layout.owners}
    return {"boxes": [[box.offsets, box.shape, owners] for box, owners in layout.boxes]}


def decode(said: Mapping[str, Any]) -> list[TensorSpec]:
    layouts = [_decoded(layout) for layout in said["layouts"]]
    return [
        TensorSpec(name=name, dtype=dtype, shape=tuple(shape), layout=layouts[number])
        for name, dtype, shape, number in said["tensors"]
    ]


def _decoded(said: Mapping[str, Any]) -> Layout | Patches:
    if "parts" in said:
        return Layout(tuple(said["parts"]), tuple(tuple(owners) for owners in said["owners"]))
    return Patches(tuple((Box(tuple(o), tuple(s)), tuple(owners)) for o, s, owners in said["boxes"]))
