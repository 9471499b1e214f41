"""Whether a run's steps still come, and in words where its ranks are when they do not. The files are read elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dtrain.launcher.console import duration, plural

PATIENCE_S = 10.0
PATIENCE_STEPS = 10
LONG_PHASES = frozenset({"evaluating", "saving", "finishing"})
LONG_PATIENCE_S = 120.0
_NAMED_RANKS = 8


class Pace:
    """The duration of the newest steps, and since when none has finished."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step_s: deque[float] = deque(maxlen=20)
        self._since = clock()

    def saw(self, record: Mapping[str, Any]) -> None:
        """A record of metrics.jsonl, be it new or from before."""
        if isinstance(record.get("step_s"), int | float):
            self._step_s.append(record["step_s"])

    def restart(self) -> None:
        """A step has finished, or an attempt begins."""
        self._since = self._clock()

    def overdue_s(self) -> float | None:
        """For how long no step has finished; None while that is nothing unusual."""
        waited_s = self._clock() - self._since
        # The median: saves and evaluations do not count.
        middle = sorted(self._step_s)[len(self._step_s) // 2] if self._step_s else 0.0
        return waited_s if waited_s >= max(PATIENCE_S, PATIENCE_STEPS * middle) else None


def is_work(waited_s: float, workers: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every rank is in a phase that may well take longer than steps do, and this is not much longer yet."""
    if workers and all(worker.get("phase") == "script" and not worker.get("step") for worker in workers):
        return True  # a script that reports no steps: there is nothing to wait for
    long = bool(workers) and all(worker.get("phase") in LONG_PHASES for worker in workers)
    return long and waited_s < LONG_PATIENCE_S


def stall_words(waited_s: float, workers: Sequence[Mapping[str, Any]], name: str) -> str:
    """`no step for 18 s: rank 0 in data, rank 1 in forward (dtrain stack NAME shows where)`"""
    by_phase: dict[str, list[int]] = {}
    for worker in sorted(workers, key=lambda each: int(each.get("global_rank", 0))):
        by_phase.setdefault(str(worker.get("phase") or "?"), []).append(int(worker.get("global_rank", 0)))
    where = ", ".join(f"{_ranks(ranks)} in {phase}" for phase, ranks in by_phase.items())
    return f"no step for {duration(waited_s)}: {where or 'no worker is there'} (dtrain stack {name} shows where)"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) > _NAMED_RANKS:
        return plural(len(ranks), "rank")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
