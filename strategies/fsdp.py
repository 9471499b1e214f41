"""Fully sharded data parallelism through torch's FSDP2 (fully_shard): parameters, gradients and optimizer state are cut
along dim 0 over the ranks; a unit's parameters are gathered for its forward and backward only.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from dtrain.cluster.errors import UsageError
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.protocol import Caps, MakeOptimizer, ModelSpec, Prediction, Topology, Wrapped
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedGradients:
    """Gradients are reduced once a step, with the last micro-batch; until then they accumulate unsharded."""

    root: FSDPModule
    optimizer: torch.optim.Optimizer

    def begin(self, *, last: bool) -> None:
        self.root.set_requires_gradient_sync(last)
        self.root.set_is_last_backward(last)

    def finish(self) -> None:
        pass

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self) -> None:
        for module in cast(nn.Module, self.root).modules():  # the root keeps its parameters for a backward
            if isinstance(module, FSDPModule):
                module.reshard()


def units(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules that are gathered as one, by name: those that match a pattern, else every item of every outermost
    ModuleList or Sequential. Raises UsageError for a pattern that matches nothing."""
    if patterns:
        names = [name for name, _ in model.named_modules() if name]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise UsageError(f"strategy.wrap: {pattern!r} matches no module. There are: {', '.join(names[:20])}")
        return [(n, m) for n, m in model.named_modules() if n and any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    found: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(module, nn.ModuleList | nn.Sequential) and prefix:
                if any(True for _ in child.parameters()):
                    found.append((prefix + name, child))
            else:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return found


class Fsdp:
    name = "fsdp"
    caps = Caps(devices=frozenset({"cpu", "cuda"}), precisions=frozenset({"fp32", "bf16"}), elementwise_optimizer=True)

    def check(self, config: StrategyConfig, topology: Topology) -> Sequence[str]:
        return ()

    def predict(self, model: ModelSpec, topology: Topology) -> Prediction:
        ranks = topology.world_size
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
        mesh = init_device_mesh(device.type, (topology.world_size,), mesh_dim_names=("shard",))
        for _, module in units(model, config.wrap):
            fully_shard(module, mesh=mesh)
        root = fully_shard(model, mesh=mesh)  # the same module object, its class extended in place
        model.to(device)  # buffers; parameters are there already
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a plain sum: the loss is divided by the global count
                module.set_force_sum_reduction_for_comms(True)
        optimizer = make_optimizer(model)
        return Wrapped(module=model, optimizer=optimizer, sync=ShardedGradients(root=root, optimizer=optimizer))


strategy = Fsdp()
