"""Functions over ranks (see rank_functions.py) that ask of `strategy: horovod` what only it could get wrong."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import odd_models
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.runtime.ranks import Ranks
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.protocol import Topology, Wrapped
from dtrain.strategies.registry import get_strategy
from dtrain.strategies.step import run_step

WIDTH = odd_models.WIDTH


class Table(nn.Module):
    """Sparse gradients of a table, then a layer."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(3, WIDTH, sparse=sparse)
        self.body = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        out: Tensor = self.body(x + self.table(kind))
        return out.sum(1)


def dense_table() -> nn.Module:
    return Table(sparse=False)


class Reentrant(nn.Module):
    """One layer, recomputed as a whole, twice: its gradient comes in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.body, x, use_reentrant=True)
        return x.sum(1)


class OnlyFirst(nn.Module):
    """Rank 0 alone uses `scale`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        x = self.body(x)
        return (x * self.scale if torch.distributed.get_rank() == 0 else x).sum(1)


class OwnSeed(nn.Module):
    """Its weights are not those of the other ranks: nobody seeded what it draws from."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.body.weight.add_(float(os.getpid() % 1000))


def half() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)


def make(ranks: Ranks, model: str) -> Wrapped:
    torch.manual_seed(0)
    topology = Topology(global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=1, device_type="cpu")
    return get_strategy("horovod").materialize(
        globals()[model](),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
        StrategyConfig(name="horovod"),
        topology,
        ranks.device,
    )


def train(ranks: Ranks, model: str, steps: int = 3, parts: int = 2) -> Any:
    """Losses, and the parameters at the end."""
    wrapped = make(ranks, model)
    losses = []
    for step in range(1, steps + 1):
        micro = odd_models.micro_batches(step, ranks.global_rank, ranks.world_size, parts)
        losses.append(run_step(wrapped, micro, odd_models.options(ranks, 7.0)).loss)
    wrapped.close()
    return [losses, [parameter.tolist() for parameter in wrapped.module.parameters()]]


def first_weights(ranks: Ranks) -> Any:
    return next(make(ranks, "OwnSeed").module.parameters()).tolist()


def what_is_left(ranks: Ranks) -> dict[str, Any]:
    """Of joining and leaving: whether the rendezvous still answers, and threads that Python knows."""
    wrapped = make(ranks, "Table")
    place = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    with socket.socket() as probe:
        probe.settimeout(5)
        answers = probe.connect_ex(place) == 0
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    wrapped.close()
    return {"address": place[0], "answers": answers, "threads": threads}


def groups(ranks: Ranks) -> dict[str, Any]:
    """In which Horovod sums: by shapes, and whether it may put two together when it comes to them at once."""
    wrapped = make(ranks, "Table")
    sync: Any = wrapped.sync
    found = {tuple(p.shape for p in group) for group in sync._distributed._p_to_group.values()}
    wrapped.close()
    return {"shapes": sorted(found), "alone": os.environ["HOROVOD_DISABLE_GROUP_FUSION"]}
