"""The micro-batches of a rank's logical shards, one shard after another: its own random numbers, its own gradient, its
own loss. What comes out is the same whichever rank has which shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtrain.cluster.errors import UsageError
from dtrain.strategies.exactgradients import ExactGradients
from dtrain.strategies.exacttree import LogicalShards
from dtrain.strategies.passes import OneByOne, one_pass
from dtrain.strategies.protocol import MicroBatch, Passed, StepOptions, Wrapped
from dtrain.strategies.state import buffer_places


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactPasses(OneByOne):
    """As many micro-batches for each shard; see LogicalShards for how many shards every rank goes through."""

    sync: ExactGradients
    shards: LogicalShards
    buffers: FixedBuffers

    def train(
        self, wrapped: Wrapped, micro_batches: Sequence[MicroBatch], options: StepOptions, divisor: float
    ) -> Passed:
        parts = len(micro_batches) // self.shards.most
        before = self.buffers.look()
        sums: list[Tensor] = []
        counts: list[float] = []
        for number, micro in enumerate(micro_batches):
            turn, part = divmod(number, parts)
            if part == 0:
                shard = self.shards.mine[turn] if turn < len(self.shards.mine) else None
                self.sync.begin_shard(shard)
                options.seed(self.shards.num if shard is None else shard)
            total, count = one_pass(wrapped, micro, options, divisor, last=number == len(micro_batches) - 1)
            if part == parts - 1:
                self.sync.end_shard()
            sums.append(total)
            counts.append(count)
        self.buffers.check(before)
        return self._sum(micro_batches, torch.stack(sums).tolist(), counts, options)

    def _sum(
        self, micro_batches: Sequence[MicroBatch], losses: list[float], counts: list[float], options: StepOptions
    ) -> Passed:
        """Of all ranks, added up exactly and rounded once (fsum). Global rank 0 says it for all: others add nothing."""
        bad = next((m for m, value in zip(micro_batches, losses, strict=True) if not math.isfinite(value)), None)
        mine = [math.nan] * self.shards.num if bad else self.shards.by_shard(losses)
        found = options.all_reduce([*mine, *self.shards.by_shard(counts)])
        if self.shards.rank:
            return Passed(loss_sum=0.0, count=0.0, bad=bad)
        loss, count = math.fsum(found[: self.shards.num]), math.fsum(found[self.shards.num :])
        return Passed(loss_sum=loss, count=count, bad=bad)


class FixedBuffers:
    """A model's persistent buffers, which no step may change: each rank would do it from what it sees itself."""

    def __init__(self, model: nn.Module) -> None:
        self._places = buffer_places(model)

    def look(self) -> dict[str, tuple[Tensor, int]]:
        """Each with how often it has been written to."""
        found = {name: getattr(module, own) for name, (module, own) in self._places.items()}
        return {name: (buffer, buffer._version) for name, buffer in found.items()}

    def check(self, before: dict[str, tuple[Tensor, int]]) -> None:
        """Raises UsageError."""
        for name, (buffer, version) in self.look().items():
            if buffer is not before[name][0] or version != before[name][1]:
                raise UsageError(
                    f"train.exact: the model changes its buffer {name} while it trains, from what each rank sees. "
                    "That depends on the layout. Leave train.exact out, or keep such state out of the model's buffers"
                )
