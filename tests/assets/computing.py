"""Functions over ranks (see rank_functions.py) that look into a step: its collectives, graphs and skipped steps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import odd_models
import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.runtime.ranks import Ranks
from dtrain.runtime.task import autocast, forward
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.forwards import prepare_forwards
from dtrain.strategies.lossscale import LossScale
from dtrain.strategies.protocol import MicroBatch, StepOptions, Topology, Wrapped
from dtrain.strategies.registry import get_strategy
from dtrain.strategies.step import NonFinite, run_step

WIDTH = odd_models.WIDTH


class Stack(nn.Module):
    """A stem, so that what goes into each block needs a gradient; three equal blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out.sum(1)


def make(ranks: Ranks, config: dict[str, Any], *, checkpointing: bool = False, compiled: bool = False) -> Wrapped:
    torch.manual_seed(0)
    strategy = StrategyConfig(**config)
    model = Stack()
    if checkpointing or compiled:
        found = [(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
        prepare_forwards(model, found, checkpointing=checkpointing, compiled=compiled)
    topology = Topology(
        global_rank=ranks.global_rank, world_size=ranks.world_size, nodes=1, device_type=ranks.device.type
    )
    return get_strategy(strategy.name).materialize(
        model, lambda m: torch.optim.Adam(m.parameters(), lr=0.01), strategy, topology, ranks.device
    )


def options(ranks: Ranks, precision: str = "fp32") -> StepOptions:
    return StepOptions(
        total_count=7.0,
        clip_grad_norm=1.0,
        autocast=autocast(precision, ranks.device, cache=False),
        forward=forward,
        loss=lambda output, batch, count: (odd_models.square_loss(output, batch) * count, count),
        all_reduce=ranks.all_reduce,
    )


def batches(ranks: Ranks, step: int, parts: int) -> list[MicroBatch]:
    return odd_models.micro_batches(step, ranks.global_rank, ranks.world_size, parts)


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def collectives(ranks: Ranks, config: dict[str, Any], parts: int) -> dict[str, int]:
    """Of one step in the steady state: how often each collective ran on gradients or parameters."""
    wrapped = make(ranks, config)
    run_step(wrapped, batches(ranks, 1, parts), options(ranks))
    with Collectives() as seen:
        run_step(wrapped, batches(ranks, 2, parts), dataclasses.replace(options(ranks), all_reduce=_alone))
    return dict(seen.counts)


def _alone(values: list[float]) -> list[float]:
    """The small sums of a step, past the counting: through the group's own method, below the dispatcher."""
    tensor = torch.tensor(values, dtype=torch.float64)
    backend: Any = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    backend.allreduce([tensor]).wait()
    return tensor.tolist()


def graphs(ranks: Ranks, config: dict[str, Any], checkpointing: bool) -> dict[str, Any]:
    """Losses of steps with micro-batches of different sizes, and how many graphs were compiled for them."""
    wrapped = make(ranks, config, checkpointing=checkpointing, compiled=True)
    found = [run_step(wrapped, batches(ranks, step, step % 3 + 1), options(ranks)).loss for step in range(1, 10)]
    return {"losses": found, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def eager(ranks: Ranks, config: dict[str, Any]) -> list[float]:
    wrapped = make(ranks, config)
    return [run_step(wrapped, batches(ranks, step, step % 3 + 1), options(ranks)).loss for step in range(1, 10)]


def overflow(ranks: Ranks, config: dict[str, Any], scale: float, rank: int) -> dict[str, Any]:
    """fp16 with a scale at which only the samples of `rank` overflow: [scale, skipped] of each step."""
    wrapped = dataclasses.replace(make(ranks, config), loss_scale=LossScale(value=scale))
    before = [odd_models.full(p).clone() for p in wrapped.module.parameters()]
    found: list[Any] = []
    changed: list[bool] = []
    for step in range(1, 9):
        micro = [_larger(part) if ranks.global_rank == rank else part for part in batches(ranks, step, 2)]
        result = run_step(wrapped, micro, options(ranks, "fp16"))
        found.append([result.loss_scale, result.skipped])
        after = [odd_models.full(p).clone() for p in wrapped.module.parameters()]
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        before = after
    updates = {int(state["step"]) for state in wrapped.optimizer.state.values()}
    return {"steps": found, "changed": changed, "updates": list(updates)}


def _larger(micro: MicroBatch) -> MicroBatch:
    x, kind, y = micro.batch
    return dataclasses.replace(micro, batch=(x, kind, y + 40.0))


def hopeless(ranks: Ranks, config: dict[str, Any]) -> list[Any]:
    """Steps whose loss is infinite in fp16 at any scale: the number of skipped ones, and the last word."""
    wrapped = dataclasses.replace(make(ranks, config), loss_scale=LossScale())
    endless = dataclasses.replace(
        options(ranks, "fp16"), loss=lambda output, batch, count: (output.sum() * float("inf"), count)
    )
    for step in range(1, 100):
        try:
            assert run_step(wrapped, batches(ranks, 1, 1), endless).skipped
        except NonFinite as error:
            return [step, str(error)]
    raise AssertionError
