"""Whether a strategy's degrees multiply to the ranks that there are. Pure, torch-free: asked before anything starts."""

from __future__ import annotations

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
            return _degree(strategy, "shard", world_size, ranks) + _foreign(
                strategy, ("replicate",), "replicate belongs to ddp; fsdp with replicas is not built yet. Leave it out"
            )


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
