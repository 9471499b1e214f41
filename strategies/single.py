"""One rank: nothing to spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.deferred import place
from dtrain.strategies.degrees import Degrees
from dtrain.strategies.protocol import MakeOptimizer, ModelSpec, Prediction, Topology, Wrapped, whole_model
from dtrain.strategies.wrapping import wrap


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGradients:
    optimizer: torch.optim.Optimizer

    def begin(self, *, last: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> bool:
        return False

    def drop_unused(self) -> None:
        pass

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self) -> None:
        pass


class Single:
    name = "single"
    caps = CAPS["single"]

    def check(self, config: StrategyConfig, topology: Topology) -> Sequence[str]:
        if topology.world_size == 1:
            return ()
        return (
            f"single is one rank, but the job has {topology.world_size}. Use ddp or fsdp, or one node and process.",
        )

    def predict(self, model: ModelSpec, config: StrategyConfig, topology: Topology) -> Prediction:
        return whole_model(model)

    def materialize(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: StrategyConfig,
        topology: Topology,
        device: torch.device,
    ) -> Wrapped:
        place(model, device)
        optimizer = make_optimizer(model)
        return wrap(model, optimizer, LocalGradients(optimizer=optimizer), Degrees(), global_rank=topology.global_rank)


strategy = Single()
