"""Cuts a model over the tensor ranks as tensorplan.py says. Every parameter becomes a DTensor, cut or whole, and with
them every activation: it keeps its global shape, so that a forward written for one rank computes what it always did.

What torch has no rule for, or a faster way, is tensorops.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dtrain.cluster.errors import UsageError
from dtrain.strategies.absent import is_absent
from dtrain.strategies.outputs import map_tensors
from dtrain.strategies.tensorops import as_blocks, compute_in_blocks, teach_torch
from dtrain.strategies.tensorplan import Cut, Plan, weight_dims


def cut_model(model: nn.Module, plan: Plan, mesh: DeviceMesh, device: torch.device, *, sequence: bool) -> None:
    """In place, before any other axis but a pipeline, whose absent parameters stay what they are. `mesh`: of the tensor
    ranks alone. `sequence`: between the cut modules activations (batch, seq, width) are cut along seq.

    Raises UsageError for a parameter that two modules want to be cut in two ways."""
    teach_torch()
    _distribute(model, plan, mesh, device)
    stream = Shard(1) if sequence else Replicate()
    for cut in plan.cuts:
        module = model.get_submodule(cut.name)
        if cut.word in ("column", "head"):
            module.register_forward_pre_hook(_whole_input(mesh))
            if cut.word == "head":
                module.register_forward_hook(_to_stream(Replicate(), mesh))
            if cut.blocks > 1:
                compute_in_blocks(module, cut.blocks, mesh)
                module.register_forward_hook(_in_blocks(cut.blocks))
        elif cut.word in ("row", "embedding"):
            module.register_forward_hook(_to_stream(stream, mesh))
            if isinstance(module, nn.Embedding):
                _keep_padding(module)
    for module in model.modules():
        if not any(True for _ in module.children()) and any(True for _ in module.parameters()):
            module.register_forward_pre_hook(_typed_inputs(mesh), prepend=True)
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    model.register_forward_hook(_plain_output)


def parameter_cut(module: nn.Module, cut: Cut, name: str) -> Placement:
    """Where the tensor ranks' parts of one parameter of a cut module lie."""
    if cut.word == "embedding":
        return Shard(0)
    outputs, inputs = weight_dims(module) if name == "weight" else (0, None)
    if cut.word in ("column", "head"):
        return _StridedShard(outputs, split_factor=cut.blocks) if cut.blocks > 1 else Shard(outputs)
    return Replicate() if inputs is None or cut.word == "whole" else Shard(inputs)


def _distribute(model: nn.Module, plan: Plan, mesh: DeviceMesh, device: torch.device) -> None:
    """Every parameter once, a tied one under its first name; all modules that had it get the same object again."""
    wanted: dict[nn.Parameter, tuple[str, Placement]] = {}
    for cut in plan.cuts:
        module = model.get_submodule(cut.name)
        for name, parameter in module.named_parameters(recurse=False):
            place = parameter_cut(module, cut, name)
            first, before = wanted.setdefault(parameter, (f"{cut.name}.{name}", place))
            if before != place:
                raise UsageError(
                    f"strategy: {first} and {cut.name}.{name} are one parameter, but the tensor plan cuts them in two "
                    f"ways ({before}, {place}). Name both in strategy.tensor_plan, column with embedding"
                )
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                _, place = wanted.get(parameter, ("", Replicate()))
                made[parameter] = parameter if is_absent(parameter) else _as_dtensor(parameter, mesh, place, device)
            setattr(module, name, made[parameter])


def _as_dtensor(parameter: nn.Parameter, mesh: DeviceMesh, place: Placement, device: torch.device) -> nn.Parameter:
    whole = parameter.detach()
    local = whole if isinstance(place, Replicate) else _part(whole, mesh.size(), mesh.get_local_rank(), place)
    if not local.is_meta:  # on paper (model.deferred_init) a part is what the whole is: a shape
        local = local.to(device)
    tensor = DTensor.from_local(local, mesh, (place,), run_check=False, shape=whole.shape, stride=whole.stride())
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def _part(whole: Tensor, degree: int, index: int, place: Placement) -> Tensor:
    """The ceil-sized chunk `index` of each block, as torch.chunk cuts, in memory of its own."""
    assert isinstance(place, Shard | _StridedShard)
    blocks = place.split_factor if isinstance(place, _StridedShard) else 1
    size = whole.shape[place.dim] // blocks
    step = -(-size // degree)
    begin, length = min(index * step, size), max(0, min(step, size - index * step))
    parts = [whole.narrow(place.dim, block * size + begin, length) for block in range(blocks)]
    return torch.cat(parts, dim=place.dim).contiguous()


def _whole_input(mesh: DeviceMesh) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_placed(args[0], Replicate(), mesh), *args[1:]) if args else args

    return hook


def _typed_inputs(mesh: DeviceMesh) -> Callable[..., Any]:
    """What comes from outside is the same on all tensor ranks; some of torch's rules want to be told (convolutions)."""
    return lambda _, args: tuple(a if isinstance(a, DTensor) else _placed(a, Replicate(), mesh) for a in args)


def _without_cache(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hugging Face's models fill a cache for generation in every forward, beginning from an empty plain tensor, which
    DTensors can't be appended to. Training has no use for it."""
    return args, {"use_cache": False, **kwargs}


def _in_blocks(blocks: int) -> Callable[..., Any]:
    return lambda module, args, output: as_blocks(output, blocks)


def _to_stream(place: Placement, mesh: DeviceMesh) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Any:
        if output.ndim < 3 and isinstance(place, Shard):  # positions, say
            return _placed(output, Replicate(), mesh)
        if isinstance(place, Shard) and output.shape[place.dim] % mesh.size():
            raise UsageError(
                f"strategy.sequence_parallel: sequences of {output.shape[place.dim]} are not divided by tensor "
                f"{mesh.size()}. Pad them in data.collate, or set sequence_parallel: false"
            )
        return _placed(output, place, mesh)

    return hook


def _keep_padding(embedding: nn.Embedding) -> None:
    """The padding entry gets no gradient. torch 2.13 would take its index for one of each rank's own entries."""
    padding = embedding.padding_idx
    if padding is not None:
        embedding.padding_idx = None
        embedding.register_forward_hook(
            lambda module, args, output: torch.where((args[0] == padding).unsqueeze(-1), output.detach(), output)
        )


def into_stage(tensor: Tensor, mesh: DeviceMesh, *, sequence: bool) -> Tensor:
    """What has come whole from another stage of a pipeline, the same on all tensor ranks, as activations lie here."""
    cut = sequence and tensor.ndim == 3 and tensor.is_floating_point() and tensor.shape[1] % mesh.size() == 0
    placed: Tensor = _placed(tensor, Shard(1) if cut else Replicate(), mesh)
    return placed


def out_of_stage(tensor: Tensor) -> Tensor:
    """The other way: whole, on every tensor rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _placed(tensor: Any, place: Placement, mesh: DeviceMesh) -> Any:
    if not isinstance(tensor, Tensor) or is_absent(tensor):
        return tensor
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, (Replicate(),), run_check=False)
    return tensor.redistribute(placements=(place,))


class _NoView(torch.autograd.Function):
    """A tensor of its own in the same memory: a DTensor gives its local part as a view, which nobody may write to, and
    in which fully_shard looks for its hook in vain after a write; it warns of each."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _plain_output(module: nn.Module, args: Any, output: Any) -> Any:
    def plain(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        whole: Tensor = _NoView.apply(tensor.full_tensor())  # type: ignore[no-untyped-call]
        return whole

    return map_tensors(plain, output)
