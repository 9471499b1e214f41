"""How a model's intervals are dealt to the stages of a pipeline, and what a schedule asks of the number of
micro-batches. Pure, torch-free: the latter is asked before anything starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

from dtrain.strategies.config import ScheduleName


def stages_a_rank(schedule: ScheduleName, asked: int | Literal["auto"]) -> int:
    if asked == "auto":
        return 2 if schedule == "interleaved" else 1
    return asked


def refused_micro_batches(schedule: ScheduleName, ranks: int, micro_batches: int) -> str:
    """What a schedule over `ranks` ranks can't do with so many micro-batches, in words; "" where it can."""
    if schedule == "1f1b" and micro_batches < ranks:
        return f"1f1b over {ranks} ranks needs {ranks} micro-batches or more a step"
    rounds = max(1, micro_batches // ranks)
    if schedule == "interleaved" and micro_batches % rounds:
        return f"interleaved over {ranks} ranks deals the micro-batches in {rounds} equal rounds"
    return ""


def idle_share(ranks: int, stages: int, micro_batches: int) -> float:
    """How much of a step a rank waits at the beginning and the end, `stages` a rank, were all of them alike
    (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    return (ranks - 1) / (stages * micro_batches + ranks - 1)


def balance(costs: Sequence[float], cuttable: Sequence[int], stages: int) -> tuple[int, ...] | None:
    """The intervals with which stages 1, 2, ... begin, so that the dearest stage is as cheap as can be; None where
    there are too few places to cut. `costs` of intervals 0, 1, ...; `cuttable` in order."""
    if len(cuttable) < stages - 1:
        return None
    total = sum(costs)
    sums = list(accumulate(costs if total else [1.0] * len(costs), initial=0.0))
    places = [0, *cuttable, len(costs)]
    # best[j]: ((dearest stage, sum of squares), cuts) of the cheapest k stages for what lies before places[j]
    best: list[tuple[tuple[float, float], tuple[int, ...]] | None]
    best = [((sums[place], sums[place] ** 2), ()) if place else None for place in places]
    for _ in range(stages - 1):
        best = [_cheapest(best, sums, places, j) for j in range(len(places))]
    last = best[-1]
    assert last is not None
    return last[1]


def _cheapest(
    best: Sequence[tuple[tuple[float, float], tuple[int, ...]] | None],
    sums: Sequence[float],
    places: Sequence[int],
    j: int,
) -> tuple[tuple[float, float], tuple[int, ...]] | None:
    """With one stage more, which ends at places[j]."""
    found = []
    for i in range(1, j):
        before = best[i]
        if before is not None:
            (dearest, squares), cuts = before
            cost = sums[places[j]] - sums[places[i]]
            found.append(((max(dearest, cost), squares + cost**2), (*cuts, places[i])))
    return min(found, default=None)


def imbalance(costs: Sequence[float], cuts: Sequence[int]) -> float:
    """The dearest stage over the mean of all."""
    bounds = [0, *cuts, len(costs)]
    parts = [math.fsum(costs[a:b]) for a, b in pairwise(bounds)]
    return max(parts) * len(parts) / total if (total := math.fsum(parts)) else 1.0
