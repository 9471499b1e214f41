"""From the config to live objects: model, optimizer, strategy. What was chosen, and why, comes back in words."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from dtrain.strategies.caps import Caps, refused
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.forwards import prepare_compiler, prepare_forwards
from dtrain.strategies.layout import describe_copies
from dtrain.strategies.lossscale import LossScale
from dtrain.strategies.protocol import ModelSpec, Topology, Wrapped
from dtrain.strategies.registry import choose, get_strategy
from dtrain.strategies.state import DTYPES, persistent_buffers
from dtrain.strategies.units import units

# Optimizers whose update of one element depends on that element alone; others see another tensor when it is cut.
_NOT_ELEMENTWISE = {"LBFGS", "Adafactor", "Muon"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    strategy: str
    why: str
    num_parameters: int
    names_from_files: Translate  # of the plain model: pretrained.py's, once it has been spread
    copies: str  # of a model that is cut, in words; "" where there is one, or none is cut


def build_model(config: ModelConfig, seed: int) -> nn.Module:
    """On CPU, the same bits on every rank. Raises UsageError for what is no module, or has nothing to train."""
    seed_everything(seed)
    name = config.target.target
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
    model = build_model(config.model, config.train.seed)
    from_files = names_from_files(model)
    spec = _measure(model, strategy_config)
    name: str = strategy_config.name
    why = "asked for"
    if name == "auto":
        name, why = choose(spec, topology, device_memory_bytes(ranks))
    strategy = get_strategy(name)
    problems = [*strategy.check(strategy_config, topology), *_unfit(strategy.caps, config, ranks.device.type, name)]
    if problems:
        raise UsageError("\n".join(f"strategy: {problem}" for problem in problems))
    _prepare(model, config.train, strategy_config, topology)
    wrapped = strategy.materialize(
        model, lambda m: make_optimizer(config.optimizer, m), strategy_config, topology, ranks.device
    )
    if config.train.precision == "fp16":
        wrapped = replace(wrapped, loss_scale=LossScale())
    copies = describe_copies(strategy_config, nodes, ranks.world_size) if name == "fsdp" else ""
    chosen = Chosen(
        strategy=name, why=why, num_parameters=spec.num_parameters, names_from_files=from_files, copies=copies
    )
    return wrapped, chosen


def _prepare(model: nn.Module, train: TrainConfig, strategy: StrategyConfig, topology: Topology) -> None:
    """Raises UsageError."""
    checkpointing = train.activation_checkpointing == "full"
    if train.compile:
        prepare_compiler(topology.device_type, topology.world_size // topology.nodes)
    if checkpointing or train.compile:
        prepare_forwards(model, units(model, strategy.wrap), checkpointing=checkpointing, compiled=train.compile)


def _unfit(caps: Caps, config: RunConfig, device_type: str, name: str) -> Sequence[str]:
    problems = refused(
        name,
        caps,
        device_type=device_type,
        precision=config.train.precision,
        checkpointing=config.train.activation_checkpointing != "none",
        compiled=config.train.compile,
    )
    optimizer = targets.resolve(config.optimizer.target.target)
    whole = getattr(optimizer, "elementwise", optimizer.__name__ not in _NOT_ELEMENTWISE) is False
    if caps.elementwise_optimizer and whole:
        problems.append(
            f"{name} cuts parameters into shards, and the update of {config.optimizer.target.target} is not "
            "elementwise: it would change. Use ddp, or another optimizer"
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
