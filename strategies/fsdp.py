"""Fully sharded data parallelism through torch's FSDP2 (fully_shard): parameters, gradients and optimizer state are cut
along dim 0 over the ranks; a unit's parameters are gathered for its forward and backward only. Gathering is collective:
every rank has to run the same units in the same order, though not all parameters in them. With `replicate` (HSDP) there
are several such copies of the model: gathering stays inside one, gradients are summed over all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from dtrain.cluster.errors import UsageError
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.deferred import place
from dtrain.strategies.layout import check_layout, degrees_of
from dtrain.strategies.mesh import make_mesh
from dtrain.strategies.protocol import MakeOptimizer, ModelSpec, Prediction, Topology, Wrapped, cut_over
from dtrain.strategies.tensor import spread_over_tensor
from dtrain.strategies.units import units
from dtrain.strategies.wrapping import wrap


class ShardedGradients:
    """Gradients are reduced once a step, with the last micro-batch; until then they accumulate unsharded.

    Every rank reduces every parameter of a unit, with zeros where its samples did not use it: FSDP's own way, to leave
    such parameters out, adds up different ones where ranks differ. A parameter that no rank used keeps no gradient.
    """

    def __init__(self, root: FSDPModule, optimizer: torch.optim.Optimizer) -> None:
        self._root = root
        self._optimizer = optimizer
        self._parameters = [p for p in cast(nn.Module, root).parameters() if p.requires_grad]
        self._num_here = sum(isinstance(p, DTensor) for p in self._parameters)  # others lie in other stages
        self._produced: set[int] = set()  # indices of parameters that this rank has a gradient for
        root.set_reduce_scatter_unused_params(True)
        watch_gathered(root, self._on_gradient)

    def begin(self, *, last: bool) -> None:
        self._root.set_requires_gradient_sync(last)
        self._root.set_is_last_backward(last)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> bool:
        return len(self._produced) < self._num_here

    def drop_unused(self) -> None:
        produced = torch.zeros(len(self._parameters), dtype=torch.int32)
        produced[list(self._produced)] = 1
        dist.all_reduce(produced)
        for parameter, ranks in zip(self._parameters, produced.tolist(), strict=True):
            if not ranks:
                parameter.grad = None

    def zero(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._produced.clear()

    def settle(self) -> None:
        reshard(self._root)

    def _on_gradient(self, index: int, _: torch.Tensor) -> None:
        self._produced.add(index)


def units_of(root: FSDPModule) -> list[FSDPModule]:
    return [module for module in cast(nn.Module, root).modules() if isinstance(module, FSDPModule)]


def reshard(root: FSDPModule) -> None:
    """After a forward without a backward: the root keeps its parameters for one."""
    for module in units_of(root):
        module.reshard()


def watch_gathered(root: FSDPModule, on_gradient: Callable[[int, torch.Tensor], None]) -> None:
    """Calls it with (index among the parameters that require a gradient, the gathered parameter) whenever a backward
    has made a gradient. Gathered parameters are other tensors, which appear with the first forward of their unit and
    stay the same afterwards."""
    parameters = [p for p in cast(nn.Module, root).parameters() if p.requires_grad]
    indices = {parameter: index for index, parameter in enumerate(parameters)}
    for unit in units_of(root):
        places = [
            (module, name, indices[parameter])
            for module in _own_modules(cast(nn.Module, unit))
            for name, parameter in module.named_parameters(recurse=False)
            if parameter in indices
        ]
        _watch_unit(cast(nn.Module, unit), places, on_gradient)


def _watch_unit(
    unit: nn.Module, places: Sequence[tuple[nn.Module, str, int]], on_gradient: Callable[[int, torch.Tensor], None]
) -> None:
    def on_first_forward(*_: object) -> None:
        first.remove()
        gathered = {getattr(module, name): index for module, name, index in places}
        for parameter, index in gathered.items():
            parameter.register_post_accumulate_grad_hook(functools.partial(on_gradient, index))

    first = unit.register_forward_pre_hook(on_first_forward)


def _own_modules(unit: nn.Module) -> Iterator[nn.Module]:
    """The unit and what lies in it, without units inside it."""
    yield unit
    for child in unit.children():
        if not isinstance(child, FSDPModule):
            yield from _own_modules(child)


def _check_parameters(model: nn.Module, wrapped: Sequence[tuple[str, nn.Module]]) -> None:
    """What fully_shard would refuse later and in other words. Raises UsageError."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise UsageError(
                f"strategy: fsdp cuts along dim 0, and {name} has none. Give it the shape (1,), or take ddp"
            )
        if not parameter.is_contiguous():
            raise UsageError(
                f"strategy: fsdp cuts contiguous parameters only, and {name} has the strides {parameter.stride()} "
                f"for the shape {tuple(parameter.shape)}. Leave the memory format as it is, or take ddp"
            )
    taken: set[nn.Parameter] = set()
    for name, module in [*wrapped, ("the rest of the model", model)]:  # inner ones first
        own = [p for p in module.parameters() if p.requires_grad and p not in taken]
        taken.update(own)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in own})
        if len(dtypes) > 1:
            raise UsageError(
                f"strategy: fsdp gathers {name} as one unit, which needs one dtype, but its parameters are "
                f"{' and '.join(dtypes)}. Set strategy.wrap so that units have one each, or take ddp"
            )


def spread(model: nn.Module, config: StrategyConfig, mesh: DeviceMesh, device: torch.device) -> FSDPModule:
    """Cuts every unit's parameters over ("replicate",) "shard", in place. Collective. Raises UsageError."""
    root = shard(model, units(model, config.wrap), mesh)
    place(model, device)  # buffers; parameters are there already
    return root


def shard(
    model: nn.Module,
    wrapped: Sequence[tuple[str, nn.Module]],
    mesh: DeviceMesh,
    ignored: set[nn.Parameter] | None = None,
) -> FSDPModule:
    """In place: `wrapped` and the rest of the model are gathered as units. Raises UsageError."""
    _check_parameters(model, wrapped)
    for _, module in wrapped:
        fully_shard(module, mesh=mesh, ignored_params=ignored)
    root = fully_shard(model, mesh=mesh, ignored_params=ignored)  # the same object, its class extended in place
    for unit in units_of(root):
        unit.set_gradient_divide_factor(1.0)  # a plain sum: the loss is divided by the global count
        unit.set_force_sum_reduction_for_comms(True)
    return root


class Fsdp:
    name = "fsdp"
    caps = CAPS["fsdp"]

    def check(self, config: StrategyConfig, topology: Topology) -> Sequence[str]:
        return [message for _, message in check_layout(config, topology.nodes, topology.world_size // topology.nodes)]

    def predict(self, model: ModelSpec, config: StrategyConfig, topology: Topology) -> Prediction:
        degrees = degrees_of(config, topology.world_size)
        ranks = degrees.shard
        sharded = Prediction(
            parameters=-(-model.parameter_bytes // ranks),
            gradients=-(-model.parameter_bytes // ranks),
            optimizer=-(-model.optimizer_slots * model.parameter_bytes // ranks),
            transient=3 * model.largest_unit_bytes,  # one gathered, the next prefetched, one unsharded gradient
        )
        return cut_over(sharded, degrees.tensor * degrees.pipeline)

    def materialize(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: StrategyConfig,
        topology: Topology,
        device: torch.device,
    ) -> Wrapped:
        degrees = degrees_of(config, topology.world_size)
        mesh = make_mesh(degrees, device.type, ("shard",))  # ranks of one copy are neighbours
        notes: tuple[str, ...] = ()
        if degrees.tensor > 1:
            notes = spread_over_tensor(model, config, mesh, device)
            mesh = mesh["replicate", "shard"] if degrees.replicate > 1 else mesh["shard"]
        root = spread(model, config, mesh, device)
        optimizer = make_optimizer(model)
        sync = ShardedGradients(root, optimizer)
        return wrap(model, optimizer, sync, degrees, global_rank=topology.global_rank, notes=notes)


strategy = Fsdp()
