"""Whether a strategy's degrees multiply to the ranks that there are. Pure, torch-free: asked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.degrees import AXES, Axis, Degrees

KEY = "strategy"
ZERO = ("zero1", "zero2", "zero3")

# The axes that a strategy has, the one first that takes what the others leave open.
_AXES: dict[str, tuple[Axis, ...]] = {
    "single": (),
    "ddp": ("replicate", "tensor", "pipeline"),
    "fsdp": ("shard", "replicate", "tensor", "pipeline"),
    "horovod": ("replicate",),
    "zero1": ("shard",),
    "zero2": ("shard",),
    "zero3": ("shard",),
}
_NOT_ITS_OWN = {
    "auto": "auto takes ddp or fsdp over all ranks. Leave it out, or name the strategy",
    "single": "single has one rank. Leave it out",
    "ddp": "ddp cuts nothing. Leave it out, or set name: fsdp",
    "horovod": "horovod cuts nothing. Leave it out, or set name: fsdp",
    **{name: f"{name} cuts over all ranks. Leave it out, or set name: fsdp" for name in ZERO},
}


def check_layout(strategy: StrategyConfig, nodes: int, procs_per_node: int) -> list[tuple[str, str]]:
    """(key, message) of everything that does not fit; empty where it does. The message holds the whole equation."""
    world_size = nodes * procs_per_node
    ranks = f"{nodes} {'node' if nodes == 1 else 'nodes'} x {procs_per_node} = {world_size}"
    own = _AXES.get(strategy.name, ())
    foreign = [
        (f"{KEY}.{axis}", f"{axis} {degree} does not go with {strategy.name}: {_NOT_ITS_OWN[strategy.name]}.")
        for axis, degree in _degrees(strategy).items()
        if axis not in own and degree != _LEFT_OUT[axis]
    ]
    foreign += _without_tensor(strategy)
    if strategy.offload != "none" and strategy.name not in ZERO:
        message = f"{strategy.offload} does not go with {strategy.name}, only with {', '.join(ZERO)}."
        foreign.append((f"{KEY}.offload", f"offload {message} Leave it out, or set name: zero3."))
    match strategy.name:
        case "auto":
            return foreign
        case "single":
            alone = [] if world_size == 1 else [(KEY, f"single = 1 rank, but {ranks}. {_ways_to_one_rank(nodes)}")]
            return alone + foreign
        case _:
            return _product(strategy, world_size, ranks) + foreign


def degrees_of(strategy: StrategyConfig, world_size: int) -> Degrees:
    """Of a layout without problems, its strategy chosen: what is left open takes what the others leave."""
    own = {axis: degree for axis, degree in _degrees(strategy).items() if axis in _AXES[strategy.name]}
    found = {axis: int(degree) for axis, degree in own.items() if degree != "auto"}
    for axis in _AXES[strategy.name]:
        found.setdefault(axis, world_size // math.prod(found.values()))
    return Degrees(**found)


def describe_copies(degrees: Degrees, nodes: int) -> str:
    """ ", 2 copies, each cut over 4 ranks of a node", where a layout has several copies that are cut; else ""."""
    if 1 in (degrees.replicate, degrees.shard):
        return ""
    inside = (degrees.world_size // nodes) % degrees.shard == 0
    return (
        f", {degrees.replicate} copies, each cut over {degrees.shard} ranks {'of a node' if inside else 'across nodes'}"
    )


def _degrees(strategy: StrategyConfig) -> dict[Axis, int | str]:
    """As asked for, outermost first."""
    return {axis: getattr(strategy, axis) for axis in AXES}


_LEFT_OUT = _degrees(StrategyConfig())


def _product(strategy: StrategyConfig, world_size: int, ranks: str) -> list[tuple[str, str]]:
    own = {
        axis: degree
        for axis, degree in _degrees(strategy).items()
        if axis in _AXES[strategy.name] and (degree, _LEFT_OUT[axis]) != (1, 1)
    }
    given = {axis: int(degree) for axis, degree in own.items() if degree != "auto"}
    product = math.prod(given.values())
    if product == world_size or (len(given) < len(own) and world_size % product == 0):
        return []
    equation = f"{strategy.name} " + " x ".join(f"{axis} {degree}" for axis, degree in own.items())
    axis = next(axis for axis, degree in given.items() if degree != 1 or len(given) == 1 or product == 1)
    if len(given) == len(own):
        unit = "rank" if product == 1 else "ranks"
        return [(f"{KEY}.{axis}", f"{equation} = {product} {unit}, but {ranks}. {_fitting(given, world_size)}")]
    divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
    found = f"{equation}: {product} does not divide {ranks} ranks."
    if len(given) == 1:
        return [(f"{KEY}.{axis}", f"{found} Set {axis} to one of {divisors}, or leave it out.")]
    return [(f"{KEY}.{axis}", f"{found} The product of {' and '.join(given)} must be one of {divisors}.")]


def _fitting(degrees: Mapping[Axis, int], world_size: int) -> str:
    """Which one degree to change, the others as they are; where none does, what to leave to auto."""
    for axis, degree in degrees.items():
        others = math.prod(degrees.values()) // degree
        if world_size % others == 0:
            return f"Set {axis}: {world_size // others}, or leave it out."
    nothing = "Neither divides" if len(degrees) == 2 else "No single change fits"
    both = "both" if len(degrees) == 2 else "some"
    return f"{nothing} {world_size}: leave {both} out, or set one that does."


def _without_tensor(strategy: StrategyConfig) -> list[tuple[str, str]]:
    """What says how to cut where nothing is cut."""
    given = {"tensor_plan": strategy.tensor_plan, "sequence_parallel": strategy.sequence_parallel}
    return [
        (f"{KEY}.{key}", f"{key} is given, but tensor is 1: nothing is cut. Set tensor: 2 or more, or leave {key} out.")
        for key, value in given.items()
        if value and strategy.tensor == 1
    ]


def _ways_to_one_rank(nodes: int) -> str:
    fewer = "cluster.nodes: 1 and " if nodes > 1 else ""
    return f"Set {fewer}cluster.procs_per_node: 1, or take ddp."
