"""Functions over ranks: a DeepSpeed whose partitions lie elsewhere than where they are looked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, cast

import parity
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dtrain.runtime.ranks import Ranks
from dtrain.strategies import zero, zero_partitions
from dtrain.strategies.config import StrategyConfig, StrategyName
from dtrain.strategies.protocol import Topology
from dtrain.strategies.registry import get_strategy
from dtrain.strategies.zero_partitions import Slice, gathered


class Trusting(torch.optim.Optimizer):
    """Scales each tensor's update by the tensor's norm, as LARS does, and says nothing of it."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad * parameter.norm() / parameter.grad.norm())


def start(ranks: Ranks, strategy: str, break_it: str = "", optimizer: str = "AdamW") -> bool:
    """Whether every parameter is what one process would begin with, after the self-check."""
    find = zero_partitions.find_slices

    def broken(*arguments: Any) -> list[Slice]:
        if break_it == "gone":
            return find(arguments[0], object(), *arguments[2:])
        return [_moved(one) if one.name == "blocks.0.norm1.weight" else one for one in find(*arguments)]

    if break_it:
        vars(zero)["find_slices"] = broken
    torch.manual_seed(3)
    model = parity.Transformer(width=32, vocab=64)
    wanted = [parameter.detach().clone() for parameter in model.parameters()]
    topology = Topology(global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=1, device_type="cpu")
    get_strategy(strategy).materialize(
        model,
        lambda m: (Trusting if optimizer == "Trusting" else torch.optim.AdamW)(m.parameters()),
        StrategyConfig(name=cast(StrategyName, strategy)),
        topology,
        ranks.device,
    )
    return all(torch.equal(_whole(p), before) for p, before in zip(model.parameters(), wanted, strict=True))


def _moved(one: Slice) -> Slice:
    """One element further to the left: over the end of the parameter before."""
    if one.flat is None or not one.mine.numel():
        return one
    mine = nn.Parameter(one.flat.detach().narrow(0, one.offset - 1, one.mine.numel()))
    return dataclasses.replace(one, mine=mine, offset=one.offset - 1)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_status"):
        return parameter.detach()
    with gathered(parameter):
        return parameter.detach().clone()


def update_bytes(ranks: Ranks, strategy: str) -> tuple[int, int]:
    """(what a model's parameters take, how much more memory this rank took at most while it updated them)."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    topology = Topology(global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=1, device_type="cpu")
    config = StrategyConfig(name=cast(StrategyName, strategy))
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    wrapped = get_strategy(strategy).materialize(
        model, lambda m: torch.optim.AdamW(m.parameters()), config, topology, ranks.device
    )
    for _ in range(2):  # the first step makes the optimizer's state
        wrapped.sync.zero()
        wrapped.sync.begin(last=True)
        wrapped.sync.backward(model(torch.ones(2, 256)).square().mean())
        wrapped.sync.finish()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            wrapped.update.apply(1.0)
    assert seen.profiler is not None
    events = seen.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]
    return size, max(accumulate(changes))
