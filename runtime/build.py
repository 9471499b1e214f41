"""From the config to live objects: model, optimizer, strategy. What was chosen, and why, comes back in words."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dtrain.cluster.errors import UsageError
from dtrain.runtime import targets
from dtrain.runtime.config import OptimizerConfig, RunConfig, TrainConfig
from dtrain.runtime.data import seed_everything
from dtrain.runtime.hfnames import Translate, names_from_files
from dtrain.runtime.modelconfig import ModelConfig
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.shares import num_micro_batches, num_samples_at_once
from dtrain.strategies.caps import Caps, refused, refused_deferred
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.deferred import Deferred, Initial
from dtrain.strategies.elementwise import is_elementwise
from dtrain.strategies.exact import materialize_exact
from dtrain.strategies.exactcheck import check_exact
from dtrain.strategies.forwards import prepare_compiler, prepare_forwards
from dtrain.strategies.layout import degrees_of, describe_copies
from dtrain.strategies.lossscale import LossScale
from dtrain.strategies.protocol import ModelSpec, Strategy, Topology, Wrapped
from dtrain.strategies.registry import choose, get_strategy
from dtrain.strategies.state import DTYPES, persistent_buffers
from dtrain.strategies.units import units


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    strategy: str
    why: str
    num_parameters: int
    num_frozen: int  # of them
    names_from_files: Translate  # of the plain model: pretrained.py's, once it has been spread
    copies: str  # of a model that is cut, in words; "" where there is one, or none is cut


def build_model(config: ModelConfig, seed: int, deferred: Deferred | None = None) -> nn.Module:
    """On CPU, the same bits on every rank; with `deferred` on paper. Raises UsageError for what is no module, or has
    nothing to train."""
    seed_everything(seed)
    name = config.target.target
    with deferred or nullcontext():
        model = targets.build(config.target)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: {name} returned {type(model).__name__}, not a torch.nn.Module")
    _freeze(model, config.frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        frozen = " that model.frozen leaves" if config.frozen else ""
        raise UsageError(f"model: {name} has no parameter that requires a gradient{frozen}")
    for name, tensor in [*model.named_parameters(), *persistent_buffers(model)]:
        if tensor.dtype not in DTYPES:
            raise UsageError(f"model: {name} is {tensor.dtype}, which checkpoints can't hold")
    return model


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """A tied parameter is frozen under any of its names. Raises UsageError for a pattern that matches nothing."""
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matching = [parameter for name, parameter in named if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(
                f"model.frozen: {pattern!r} matches no parameter. There are: {', '.join(n for n, _ in named[:12])}"
            )
        for parameter in matching:
            parameter.requires_grad_(False)


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Raises UsageError for a group that matches nothing."""
    optimizer = targets.build(config.target, _groups(config, model))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer: {config.target.target} returned {type(optimizer).__name__}, not an Optimizer")
    return optimizer


def _groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """One group a pattern, first match wins, and one for the rest."""
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = []
    for group in config.groups:
        names = [name for name in left if fnmatch.fnmatchcase(name, group.match)]
        if not names:
            some = ", ".join(list(dict(model.named_parameters()))[:12])
            raise UsageError(f"optimizer.groups: {group.match!r} matches no parameter that is left. There are: {some}")
        groups.append({"params": [left.pop(name) for name in names], **group.settings})
    if left:
        groups.insert(0, {"params": list(left.values())})
    return groups


def build(config: RunConfig, strategy_config: StrategyConfig, ranks: Ranks, nodes: int) -> tuple[Wrapped, Chosen]:
    """Collective. Raises UsageError where the pieces do not fit."""
    topology = Topology(
        global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=nodes, device_type=ranks.device.type
    )
    deferred = Deferred() if config.model.deferred_init else None
    model = build_model(config.model, config.train.seed, deferred)
    initial = Initial(deferred, model) if deferred else None
    from_files = names_from_files(model)
    spec = _measure(model, strategy_config)
    num_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    name: str = strategy_config.name
    why = "asked for"
    if name == "auto":
        name, why = choose(spec, topology, device_memory_bytes(ranks))
        strategy_config = replace(strategy_config, name=name)
    strategy = get_strategy(name)
    unfit = [
        *strategy.check(strategy_config, topology),
        *_unfit(strategy.caps, config, ranks.device.type, name, strategy_config.tensor),
    ]
    problems = [("strategy", message) for message in unfit] + _inexact(config, strategy_config, topology)
    if problems:
        raise UsageError("\n".join(f"{key}: {message}" for key, message in problems))
    if deferred and (problem := refused_deferred(strategy_config, strategy.caps)):
        raise UsageError(f"model.deferred_init: {problem}")
    _prepare(model, config.train, strategy_config, topology)
    if strategy_config.pipeline > 1:
        if initial:
            initial.make_buffers(model)
        wrapped = _pipeline(model, config, strategy_config, topology, ranks.device)
    else:
        wrapped = _materializer(strategy, config.train)(
            model, lambda m: make_optimizer(config.optimizer, m), strategy_config, topology, ranks.device
        )
    if initial:
        initial.fill(wrapped)
    if config.train.precision == "fp16":
        wrapped = replace(wrapped, loss_scale=LossScale())
    copies = describe_copies(wrapped.degrees, nodes)
    chosen = Chosen(
        strategy=name,
        why=why,
        num_parameters=spec.num_parameters,
        num_frozen=num_frozen,
        names_from_files=from_files,
        copies=copies,
    )
    return wrapped, chosen


def _materializer(strategy: Strategy, train: TrainConfig) -> Callable[..., Wrapped]:
    if train.exact is None:
        return strategy.materialize
    return partial(materialize_exact, num_shards=train.exact.shards)


def _inexact(config: RunConfig, strategy: StrategyConfig, topology: Topology) -> list[tuple[str, str]]:
    if config.train.exact is None:
        return []
    return check_exact(
        strategy,
        config.train.exact.shards,
        world_size=topology.world_size,
        batch_size=config.data.batch_size,
        compiled=config.train.compile,
    )


def _pipeline(
    model: nn.Module, config: RunConfig, strategy: StrategyConfig, topology: Topology, device: torch.device
) -> Wrapped:
    """The model in stages. Raises UsageError where it can't be cut so."""
    from dtrain.runtime.example import example_forward  # and torch's pipelining only where it is used
    from dtrain.strategies.pipeline import materialize

    data_ranks = degrees_of(strategy, topology.world_size).data
    samples = num_samples_at_once(config.data.batch_size, data_ranks, config.train.micro_batch)
    example = example_forward(config, model, samples, device)
    return materialize(
        model,
        lambda m: make_optimizer(config.optimizer, m),
        strategy,
        topology,
        device,
        example,
        num_micro_batches(config.data.batch_size, data_ranks, config.train.micro_batch),
    )


def _prepare(model: nn.Module, train: TrainConfig, strategy: StrategyConfig, topology: Topology) -> None:
    """Raises UsageError."""
    checkpointing = train.activation_checkpointing == "full"
    if train.compile:
        prepare_compiler(topology.device_type, topology.world_size // topology.nodes)
    if checkpointing or train.compile:
        prepare_forwards(model, units(model, strategy.wrap), checkpointing=checkpointing, compiled=train.compile)


def _unfit(caps: Caps, config: RunConfig, device_type: str, name: str, tensor: int) -> Sequence[str]:
    problems = refused(
        name,
        caps,
        device_type=device_type,
        precision=config.train.precision,
        checkpointing=config.train.activation_checkpointing != "none",
        compiled=config.train.compile,
        tensor=tensor,
    )
    whole = is_elementwise(targets.resolve(config.optimizer.target.target)) is False
    if (caps.elementwise_optimizer or tensor > 1) and whole:
        cutting = name if caps.elementwise_optimizer else f"tensor {tensor}"
        problems.append(
            f"{cutting} cuts parameters into shards, and the update of {config.optimizer.target.target} is not "
            "elementwise: it would change. Use ddp without tensor, or another optimizer"
        )
    return problems


def _measure(model: nn.Module, config: StrategyConfig) -> ModelSpec:
    def size(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    parts = [size(module) for _, module in units(model, config.wrap)]
    return ModelSpec(
        num_parameters=sum(p.numel() for p in model.parameters()),
        parameter_bytes=size(model),
        largest_unit_bytes=max([*parts, size(model) - sum(parts)]),
    )


def device_memory_bytes(ranks: Ranks) -> int:
    """The smallest over the ranks: all must choose alike. On CPU a rank's share of the machine's memory."""
    if ranks.device.type == "cuda":
        mine = torch.cuda.get_device_properties(ranks.device).total_memory
    else:
        mine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks.world_size
    if ranks.world_size > 1:
        smallest = torch.tensor(mine)
        torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
        mine = int(smallest)
    return mine


def has_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
