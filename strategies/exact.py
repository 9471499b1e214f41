"""`train.exact`: single, ddp and fsdp with the same bits in every layout, at every world size up to the number of
logical shards. The model is spread as without it; how gradients, losses and norms are added up is exactgradients.py's,
exactpasses.py's and exactupdate.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.buckets import split_into_buckets
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.deferred import place
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.exactcheck import check_fused
from dtrain.strategies.exactgradients import ExactGradients, Watch, watch_parameters
from dtrain.strategies.exactpasses import ExactPasses, FixedBuffers
from dtrain.strategies.exacttree import LogicalShards
from dtrain.strategies.exactupdate import ExactUpdate
from dtrain.strategies.layout import degrees_of
from dtrain.strategies.localstep import step_of
from dtrain.strategies.mesh import make_mesh
from dtrain.strategies.protocol import MakeOptimizer, Topology, Wrapped
from dtrain.strategies.wrapping import wrap


def materialize_exact(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    config: StrategyConfig,
    topology: Topology,
    device: torch.device,
    *,
    num_shards: int,
) -> Wrapped:
    """In the place of the strategy's own. `config.name`: single, ddp or fsdp. Collective. Raises UsageError."""
    _check_model(model)
    degrees = degrees_of(config, topology.world_size)
    watch, settle = _spread(model, config, degrees, device)
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        if problem := check_fused(group):
            raise UsageError(f"optimizer: {problem}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    shards = LogicalShards(num=num_shards, rank=topology.global_rank, world_size=topology.world_size)
    order = {parameter: index for index, parameter in enumerate(parameters)}
    backwards = parameters[::-1]  # as backward reaches them
    buckets = [[order[p] for p in bucket] for bucket in split_into_buckets(backwards, [p.numel() for p in backwards])]
    sync = ExactGradients(parameters, buckets, shards, degrees, watch=watch, settle=settle)
    return wrap(
        model,
        optimizer,
        sync,
        degrees,
        global_rank=topology.global_rank,
        passes=ExactPasses(sync=sync, shards=shards, buffers=FixedBuffers(model)),
        update=ExactUpdate(optimizer=optimizer, step=step_of(optimizer), degrees=degrees, rank=topology.global_rank),
        shards=shards,
    )


def _spread(
    model: nn.Module, config: StrategyConfig, degrees: Degrees, device: torch.device
) -> tuple[Watch, Callable[[], None]]:
    """(how its gradients are watched, what is to be done after forwards without a backward)."""
    if device.type == "cpu":
        torch.set_num_threads(1)  # sums inside a kernel are cut by threads, whose number depends on the ranks of a node
    if config.name != "fsdp":
        place(model, device)
        return watch_parameters([p for p in model.parameters() if p.requires_grad]), lambda: None
    from dtrain.strategies import fsdp

    root = fsdp.spread(model, config, make_mesh(degrees, device.type, ("shard",)), device)
    root.set_requires_gradient_sync(False)
    return partial(fsdp.watch_gathered, root), partial(fsdp.reshard, root)


def _check_model(model: nn.Module) -> None:
    """Raises UsageError for a model whose numbers depend on what a rank sees together."""
    for name, module in model.named_modules():
        running = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if running or isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UsageError(
                f"train.exact: {name or 'the model'} is a {type(module).__name__}, whose statistics are those of the "
                "samples that one rank sees. Take a norm without them (LayerNorm, GroupNorm), or leave train.exact out"
            )
