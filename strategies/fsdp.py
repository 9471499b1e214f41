"""Fully sharded data parallelism through torch's FSDP2 (fully_shard): parameters, gradients and optimizer state are cut
along dim 0 over the ranks; a unit's parameters are gathered for its forward and backward only. Gathering is collective:
every rank has to run the same units in the same order, though not all parameters in them. With `replicate` (HSDP) there
are several such copies of the model: gathering stays inside one, gradients are summed over all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dtrain.cluster.errors import UsageError
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.layout import check_layout, fsdp_degrees
from dtrain.strategies.protocol import MakeOptimizer, ModelSpec, Prediction, Topology, Wrapped
from dtrain.strategies.units import units


class ShardedGradients:
    """Gradients are reduced once a step, with the last micro-batch; until then they accumulate unsharded.

    Every rank reduces every parameter of a unit, with zeros where its samples did not use it: FSDP's own way, to leave
    such parameters out, adds up different ones where ranks differ. A parameter that no rank used keeps no gradient.
    """

    def __init__(self, root: FSDPModule, optimizer: torch.optim.Optimizer) -> None:
        self._root = root
        self._optimizer = optimizer
        self._units = [module for module in cast(nn.Module, root).modules() if isinstance(module, FSDPModule)]
        self._parameters = [p for p in cast(nn.Module, root).parameters() if p.requires_grad]
        self._produced: set[int] = set()  # indices of parameters that this rank has a gradient for
        root.set_reduce_scatter_unused_params(True)
        self._watch()

    def begin(self, *, last: bool) -> None:
        self._root.set_requires_gradient_sync(last)
        self._root.set_is_last_backward(last)

    def finish(self) -> bool:
        return len(self._produced) < len(self._parameters)

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
        for module in self._units:  # the root keeps its parameters for a backward
            module.reshard()

    def _watch(self) -> None:
        """Notes which parameters get a gradient. Gathered parameters are other tensors, which appear with the first
        forward of their unit and stay the same afterwards."""
        indices = {parameter: index for index, parameter in enumerate(self._parameters)}
        for unit in self._units:
            places = [
                (module, name, indices[parameter])
                for module in _own_modules(cast(nn.Module, unit))
                for name, parameter in module.named_parameters(recurse=False)
                if parameter in indices
            ]
            self._watch_unit(cast(nn.Module, unit), places)

    def _watch_unit(self, unit: nn.Module, places: Sequence[tuple[nn.Module, str, int]]) -> None:
        def on_first_forward(*_: object) -> None:
            first.remove()
            gathered = {getattr(module, name): index for module, name, index in places}
            for parameter, index in gathered.items():
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._produced.add(index))

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


def _mesh(config: StrategyConfig, world_size: int, device: torch.device) -> DeviceMesh:
    """Ranks of one copy of the model are neighbours: a node's, where they fit into one."""
    replicate, shard = fsdp_degrees(config, world_size)
    if replicate == 1:
        return init_device_mesh(device.type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


class Fsdp:
    name = "fsdp"
    caps = CAPS["fsdp"]

    def check(self, config: StrategyConfig, topology: Topology) -> Sequence[str]:
        return [message for _, message in check_layout(config, topology.nodes, topology.world_size // topology.nodes)]

    def predict(self, model: ModelSpec, config: StrategyConfig, topology: Topology) -> Prediction:
        _, ranks = fsdp_degrees(config, topology.world_size)
        return Prediction(
            parameters=-(-model.parameter_bytes // ranks),
            gradients=-(-model.parameter_bytes // ranks),
            optimizer=-(-model.optimizer_slots * model.parameter_bytes // ranks),
            transient=3 * model.largest_unit_bytes,  # one gathered, the next prefetched, one unsharded gradient
        )

    def materialize(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: StrategyConfig,
        topology: Topology,
        device: torch.device,
    ) -> Wrapped:
        mesh = _mesh(config, topology.world_size, device)
        wrapped = units(model, config.wrap)
        _check_parameters(model, wrapped)
        for _, module in wrapped:
            fully_shard(module, mesh=mesh)
        root = fully_shard(model, mesh=mesh)  # the same module object, its class extended in place
        model.to(device)  # buffers; parameters are there already
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a plain sum: the loss is divided by the global count
                module.set_force_sum_reduction_for_comms(True)
        optimizer = make_optimizer(model)
        return Wrapped(module=model, optimizer=optimizer, sync=ShardedGradients(root, optimizer))


strategy = Fsdp()
