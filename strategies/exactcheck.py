"""What speaks against `train.exact`. Pure, torch-free: asked before anything starts, and again where
`strategy: auto` has chosen."""

from __future__ import annotations

from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig

KEY = "train.exact"


def check_exact(
    strategy: StrategyConfig, shards: int, *, world_size: int, batch_size: int, compiled: bool
) -> list[tuple[str, str]]:
    """(key, message) of everything that does not fit; empty where it does."""
    found = []
    if strategy.name in CAPS and not CAPS[strategy.name].exact:
        fitting = ", ".join(name for name, caps in CAPS.items() if caps.exact)
        found.append((KEY, f"{strategy.name} adds gradients up in an order of its own. Take one of {fitting}."))
    for axis in ("tensor", "pipeline"):
        if (degree := getattr(strategy, axis)) not in (1, "auto"):
            found.append((KEY, f"goes with data parallelism only, and strategy.{axis} is {degree}. Leave one out."))
    if compiled:
        found.append((KEY, "does not go with train.compile: what is compiled depends on the layout. Leave one out."))
    if shards < world_size:
        found.append((f"{KEY}.shards", f"{shards} for {world_size} ranks: each needs one. Set at least {world_size}."))
    if shards > batch_size:
        parts = f"{shards} parts of the {batch_size} samples of data.batch_size"
        found.append((f"{KEY}.shards", f"{parts}: some would be empty. Set at most {batch_size}."))
    return found


def check_fused(settings: dict[str, object]) -> str:
    """Of the optimizer's keywords, or a group's: why they do not go with train.exact; "" where they do."""
    if not settings.get("fused"):
        return ""
    return (
        "a fused optimizer rounds in another way where it sees a part of a tensor, so train.exact is not possible with "
        "it. Leave one of the two out."
    )
