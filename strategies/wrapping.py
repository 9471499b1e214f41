"""Puts together what a strategy made; parts that it does not bring are the common ones."""

from __future__ import annotations

import torch
from torch import nn

from dtrain.strategies.degrees import Degrees
from dtrain.strategies.exacttree import LogicalShards
from dtrain.strategies.localstep import step_of
from dtrain.strategies.passes import OneByOne
from dtrain.strategies.protocol import GradientSync, Passes, State, Update, Wrapped
from dtrain.strategies.state import OwnState
from dtrain.strategies.update import OwnGradients


def wrap(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    sync: GradientSync,
    degrees: Degrees,
    *,
    global_rank: int,
    passes: Passes | None = None,
    update: Update | None = None,
    state: State | None = None,
    notes: tuple[str, ...] = (),
    shards: LogicalShards | None = None,
) -> Wrapped:
    return Wrapped(
        module=module,
        optimizer=optimizer,
        sync=sync,
        passes=passes or OneByOne(),
        update=update or OwnGradients(optimizer=optimizer, step=step_of(optimizer)),
        state=state or OwnState(model=module, optimizer=optimizer, world_size=degrees.world_size),
        degrees=degrees,
        data=degrees.data_rank(global_rank),
        notes=notes,
        shards=shards,
    )
