"""Canonical state: model and optimizer as boxes of globally named tensors, whatever the layout.

Names: `model.<fqn>` and `optim.<fqn>.<key>`. A tied parameter has one name, the first that named_parameters() gives.
What is not a tensor in the optimizer's state comes back as JSON values beside the tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.cluster.errors import CheckpointError
from dtrain.strategies.absent import is_absent
from dtrain.strategies.boxes import Box, Layout, Patches, TensorSpec, replicated
from dtrain.strategies.placement import dtensor_layout, local_boxes
from dtrain.strategies.protocol import Local, Reader, Saved

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnState:
    """Of a module and an optimizer that hold their tensors themselves, plain or as DTensors."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    world_size: int

    def canonical(self) -> tuple[list[TensorSpec], Local, dict[str, dict[str, Any]]]:
        return canonical_state(self.model, self.optimizer, self.world_size)

    def load(self, saved: Saved, values: Mapping[str, Mapping[str, Any]], read: Reader) -> None:
        load_canonical(self.model, self.optimizer, saved, values, read, self.world_size)

    def written(self) -> None:
        pass


def canonical_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, world_size: int
) -> tuple[list[TensorSpec], Local, dict[str, dict[str, Any]]]:
    """(specs, equal on every rank; this rank's boxes as views of the live tensors; optimizer values that are no
    tensors, by parameter name and key). No communication."""
    specs: list[TensorSpec] = []
    local: Local = {}
    for name, tensor in _named_tensors(model, optimizer):
        spec, boxes = describe(name, tensor, world_size)
        specs.append(spec)
        local[name] = boxes
    values = {
        name: plain
        for name, parameter in model.named_parameters()
        if (plain := {k: v for k, v in optimizer.state.get(parameter, {}).items() if not isinstance(v, Tensor)})
    }
    return specs, local, values


def _named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    """Those that have values here: a pipeline's other stages have the rest."""
    for name, parameter in model.named_parameters():
        if not is_absent(parameter):
            yield f"model.{name}", parameter.detach()
    for name, buffer in persistent_buffers(model):
        if not is_absent(buffer):
            yield f"model.{name}", buffer
    for name, parameter in model.named_parameters():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                yield f"optim.{name}.{key}", value


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    kept = model.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def buffer_places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> (module, own name) of each persistent buffer: a model may put another tensor in its place."""
    kept = {name for name, _ in persistent_buffers(model)}
    return {
        name: (module, own)
        for prefix, module in model.named_modules()
        for own, _ in module.named_buffers(recurse=False)
        if (name := f"{prefix}.{own}".removeprefix(".")) in kept
    }


def describe(name: str, tensor: Tensor, world_size: int) -> tuple[TensorSpec, list[tuple[Box, Tensor]]]:
    """Where one tensor lies: its spec, and the boxes that this rank holds."""
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"{name}: tensors of {tensor.dtype} can't be checkpointed")
    shape = tuple(tensor.shape)
    layout: Layout | Patches
    if not isinstance(tensor, DTensor):
        layout = replicated(len(shape), world_size)
        boxes = [(Box((0,) * len(shape), shape), tensor)]
    else:
        layout = dtensor_layout(tensor)
        boxes = local_boxes(tensor)
    return TensorSpec(name=name, dtype=DTYPES[tensor.dtype], shape=shape, layout=layout), boxes


def load_canonical(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Saved,
    values: Mapping[str, Mapping[str, Any]],
    read: Reader,
    world_size: int,
) -> None:
    """Fills model and optimizer from a checkpoint's tensors, whatever layout they were saved in. `read` gets what all
    ranks hold, and what this rank is to fill; whether ranks talk is its affair.

    Raises CheckpointError naming every tensor that is missing or does not fit.
    """
    make_optimizer_state({p: name for name, p in model.named_parameters()}, optimizer, saved, values, empty_state)
    specs, local, _ = canonical_state(model, optimizer, world_size)
    check_fit(specs, saved)
    read(specs, ((name, box, tensor) for name, boxes in local.items() for box, tensor in boxes if box.num_elements))


def check_fit(specs: Sequence[TensorSpec], saved: Saved) -> None:
    """Raises CheckpointError naming every tensor that is missing or does not fit."""
    problems = list(_mismatches(specs, saved))
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError("the checkpoint does not fit this model:\n  " + "\n  ".join(problems[:20]) + more)


def _mismatches(specs: Sequence[TensorSpec], saved: Saved) -> Iterable[str]:
    for spec in specs:
        if spec.name not in saved:
            yield f"{spec.name}: not in the checkpoint"
        elif saved[spec.name] != (spec.dtype, spec.shape):
            dtype, shape = saved[spec.name]
            yield f"{spec.name}: {dtype} {list(shape)} there, {spec.dtype} {list(spec.shape)} here"
    for name in sorted(saved.keys() - {spec.name for spec in specs}):
        yield f"{name}: in the checkpoint, not in this model or optimizer"


def make_optimizer_state(
    names: Mapping[nn.Parameter, str],
    optimizer: torch.optim.Optimizer,
    saved: Saved,
    values: Mapping[str, Mapping[str, Any]],
    empty: Callable[[nn.Parameter, str, torch.dtype, tuple[int, ...]], Tensor],
) -> None:
    """Empty tensors for every saved optimizer state: empty(what the optimizer holds of a parameter, key, dtype, global
    shape). `names`: of what it holds."""
    keys: dict[str, list[str]] = defaultdict(list)  # a state key holds no dot, a parameter's name may
    for name in saved:
        if name.startswith("optim."):
            owner, _, key = name.removeprefix("optim.").rpartition(".")
            keys[owner].append(key)
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        if is_absent(parameter):
            continue
        name = names[parameter]
        entry: dict[str, Any] = dict(values.get(name, {}))
        for key in keys[name]:
            dtype, shape = saved[f"optim.{name}.{key}"]
            entry[key] = empty(parameter, key, _TORCH_DTYPES[dtype], shape)
        if entry:
            state[index] = entry
    # load_state_dict puts each value where the optimizer wants it (a fused Adam's step on the device, for one).
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for index, entry in state.items():  # but it also casts to the parameter's dtype, whatever the state's was
        made = optimizer.state[parameters[index]]
        for key, wanted in entry.items():
            if isinstance(wanted, Tensor) and made[key].dtype != wanted.dtype and key != "step":
                made[key] = made[key].to(wanted.dtype)


def empty_state(parameter: Tensor, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """In the layout of the parameter where the shapes agree."""
    if shape and tuple(parameter.shape) == shape:
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)
