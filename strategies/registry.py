"""Strategies by name, as dotted strings, so that naming one imports only its own file; and `auto`."""

from __future__ import annotations

import importlib
from typing import cast

from dtrain.strategies.config import StrategyConfig, StrategyName
from dtrain.strategies.protocol import ModelSpec, Strategy, Topology

_STRATEGIES = {  # module:name of the object
    "single": "dtrain.strategies.single:strategy",
    "ddp": "dtrain.strategies.ddp:strategy",
    "fsdp": "dtrain.strategies.fsdp:strategy",
    "horovod": "dtrain.strategies.horovod:strategy",
    "zero1": "dtrain.strategies.zero:zero1",
    "zero2": "dtrain.strategies.zero:zero2",
    "zero3": "dtrain.strategies.zero:zero3",
}

# Activations, the allocator's slack and the framework itself want room too.
STATES_SHARE = 0.6


def get_strategy(name: str) -> Strategy:
    module, _, attribute = _STRATEGIES[name].partition(":")
    return cast(Strategy, getattr(importlib.import_module(module), attribute))


def choose(model: ModelSpec, topology: Topology, device_memory_bytes: int) -> tuple[StrategyName, str]:
    """The name that `strategy: auto` stands for, and why, in one sentence."""
    if topology.world_size == 1:
        return "single", "one rank"
    need = get_strategy("ddp").predict(model, StrategyConfig(name="ddp"), topology).total
    room = int(device_memory_bytes * STATES_SHARE)
    sizes = f"{_gib(need)} of parameters, gradients and optimizer state a rank"
    limit = f"{_gib(room)} ({STATES_SHARE:.0%} of {_gib(device_memory_bytes)})"
    if need <= room:
        return "ddp", f"{sizes} fit in {limit}"
    return "fsdp", f"{sizes} do not fit in {limit}, so they are sharded"


def _gib(size: int) -> str:
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
