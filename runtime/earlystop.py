"""Whether evaluations still improve: pure functions over a history that lies in the checkpoints, so that a restart,
a relaunch or another world size goes on counting where the run was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dtrain.runtime.config import EarlyStopConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Of one metric. `seen`: the step of the newest evaluation that was counted, 0 for none."""

    metric: str
    mode: Literal["min", "max"]
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # evaluations in a row without an improvement
    seen: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def begin(config: EarlyStopConfig, saved: Mapping[str, Any] | None) -> History:
    """`saved`: to_json() of an earlier history, which goes on if it was of the same metric."""
    if saved and (saved["metric"], saved["mode"]) == (config.metric, config.mode):
        return History(**saved)
    return History(metric=config.metric, mode=config.mode)


def advance(history: History, step: int, value: float, min_delta: float) -> History:
    """After the evaluation of `step`; one that was counted before, and is only repeated, changes nothing."""
    if step <= history.seen:
        return history
    if improves(value, history.best, history.mode, min_delta):
        return replace(history, best=value, best_step=step, waited=0, seen=step)
    return replace(history, waited=history.waited + 1, seen=step)


def improves(value: float, best: float | None, mode: Literal["min", "max"], min_delta: float = 0.0) -> bool:
    """Numbers that are not finite are never an improvement."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    gain = best - value if mode == "min" else value - best
    return gain > 0 and gain >= min_delta


def verdict(history: History, config: EarlyStopConfig) -> str:
    """Why the run is to end, empty where it goes on."""
    if history.waited < config.patience:
        return ""
    times = f"{history.waited} evaluation{'' if history.waited == 1 else 's'}"
    best = "it was never finite" if history.best is None else f"best {history.best:.6g} at step {history.best_step}"
    return f"stopped early at step {history.seen}: {history.metric} did not improve for {times} ({best})"
