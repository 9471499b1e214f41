"""Whether a strategy's degrees multiply to the ranks that there are. Pure, torch-free: asked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dtrain.strategies.config import StrategyConfig

KEY = "strategy"


def check_layout(strategy: StrategyConfig, nodes: int, procs_per_node: int) -> list[tuple[str, str]]:
    """(key, message) of everything that does not fit; empty where it does. The message holds the whole equation."""
    world_size = nodes * procs_per_node
    ranks = f"{nodes} {'node' if nodes == 1 else 'nodes'} x {procs_per_node} = {world_size}"
    match strategy.name:
        case "auto":
            return _foreign(strategy, ("replicate", "shard"), "auto chooses it. Leave it out, or name the strategy")
        case "single":
            alone = [] if world_size == 1 else [(KEY, f"single = 1 rank, but {ranks}. {_ways_to_one_rank(nodes)}")]
            return alone + _foreign(strategy, ("replicate", "shard"), "single has one rank. Leave it out")
        case "ddp":
            return _degree(strategy, "replicate", world_size, ranks) + _foreign(
                strategy, ("shard",), "ddp cuts nothing. Leave it out, or set name: fsdp"
            )
        case "fsdp":
            return _product(strategy, world_size, ranks)


def fsdp_degrees(strategy: StrategyConfig, world_size: int) -> tuple[int, int]:
    """(replicate, shard) of a layout without problems: what one leaves open the other decides; all is sharded where
    both do."""
    if strategy.replicate != "auto":
        return strategy.replicate, world_size // strategy.replicate
    shard = world_size if strategy.shard == "auto" else strategy.shard
    return world_size // shard, shard


def describe_copies(strategy: StrategyConfig, nodes: int, world_size: int) -> str:
    """ ", 2 copies, each cut over 4 ranks of a node", where a layout has several copies that are cut; else ""."""
    replicate, shard = fsdp_degrees(strategy, world_size)
    if 1 in (replicate, shard):
        return ""
    inside = (world_size // nodes) % shard == 0
    return f", {replicate} copies, each cut over {shard} ranks {'of a node' if inside else 'across nodes'}"


def _product(strategy: StrategyConfig, world_size: int, ranks: str) -> list[tuple[str, str]]:
    degrees = {"replicate": strategy.replicate, "shard": strategy.shard}
    equation = "strategy: fsdp " + " x ".join(f"{axis} {degree}" for axis, degree in degrees.items())
    given = {axis: degree for axis, degree in degrees.items() if degree != "auto"}
    product = math.prod(given.values())
    if product == world_size or (len(given) < 2 and world_size % product == 0):
        return []
    axis, degree = next(iter(given.items()))
    if len(given) == 2:
        unit = "rank" if product == 1 else "ranks"
        return [(f"{KEY}.{axis}", f"{equation} = {product} {unit}, but {ranks}. {_fitting(given, world_size)}")]
    divisors = ", ".join(str(d) for d in range(1, world_size + 1) if world_size % d == 0)
    found = f"{equation}: {degree} does not divide {ranks} ranks."
    return [(f"{KEY}.{axis}", f"{found} Set {axis} to one of {divisors}, or leave it out.")]


def _fitting(degrees: Mapping[str, int], world_size: int) -> str:
    """Which one degree to change, the other as it is; where neither divides the ranks, what to leave to auto."""
    for axis, other in (("replicate", "shard"), ("shard", "replicate")):
        if world_size % degrees[other] == 0:
            return f"Set {axis}: {world_size // degrees[other]}, or leave it out."
    return f"Neither divides {world_size}: leave both out, or set one that does."


def _degree(strategy: StrategyConfig, axis: str, world_size: int, ranks: str) -> list[tuple[str, str]]:
    degree = getattr(strategy, axis)
    if degree in ("auto", world_size):
        return []
    unit = "rank" if degree == 1 else "ranks"
    equation = f"strategy: {strategy.name} {axis} {degree} = {degree} {unit}, but {ranks}."
    return [(f"{KEY}.{axis}", f"{equation} Set {axis}: {world_size}, or leave it out.")]


def _foreign(strategy: StrategyConfig, keys: tuple[str, ...], reason: str) -> list[tuple[str, str]]:
    given = [key for key in keys if getattr(strategy, key) != "auto"]
    return [
        (f"{KEY}.{key}", f"{key} {getattr(strategy, key)} does not go with {strategy.name}: {reason}.") for key in given
    ]


def _ways_to_one_rank(nodes: int) -> str:
    fewer = "cluster.nodes: 1 and " if nodes > 1 else ""
    return f"Set {fewer}cluster.procs_per_node: 1, or take ddp."
