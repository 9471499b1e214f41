"""What a rank reads in exact mode: its logical shards one after another, each as a rank of its own would read it."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.runtime.data import Part, Plan


class ShardPlan:
    """Keeps data.Plan. `plans`: of this rank's shards, in order, with as many micro-batches a step in each; `most`: the
    shards of the rank that has most. Who has fewer goes along with a borrowed sample, so that collectives match."""

    def __init__(self, plans: Sequence[Plan], most: int) -> None:
        self._plans = plans
        self._missing = most - len(plans)

    def micro_batches(self, step: int) -> list[Part]:
        of_shards = [plan.micro_batches(step) for plan in self._plans]
        joining = [(pairs[:1], 0) for pairs, _ in of_shards[0]] * self._missing
        return [part for parts in of_shards for part in parts] + joining

    def position(self, step: int) -> int:
        return self._plans[0].position(step)
