"""The tensor axis of ddp and fsdp: neighbouring ranks hold a part of each large layer and work on the same samples.
tensorplan.py says what is cut, tensorcuts.py cuts; the other axes spread what is left, as they always do.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.tensorcuts import cut_model
from dtrain.strategies.tensorplan import describe, tensor_plan


def spread_over_tensor(
    model: nn.Module, config: StrategyConfig, mesh: DeviceMesh, device: torch.device
) -> tuple[str, ...]:
    """In place, first of all axes: the model's parameters lie on `device` afterwards. What was done, for a person.

    `mesh` has the axis where its degree is above 1. Raises UsageError where the model does not fit."""
    if config.tensor == 1:
        return ()
    plan = tensor_plan(model, config.tensor_plan, config.tensor)
    cut_model(model, plan, mesh["tensor"], device, sequence=config.sequence_parallel)
    return (describe(plan, config.tensor, sequence=config.sequence_parallel),)
