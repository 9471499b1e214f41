"""The mean loss over a whole data set, spread over the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtrain.cluster.errors import UsageError
from dtrain.runtime.batches import Batches
from dtrain.runtime.data import Count, Source
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.task import Loss, forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation needs besides the model; the same at every step."""

    make_source: Callable[[], Source]  # of one pass
    ranks: Ranks
    workers: int
    collate: Callable[[list[Any]], Any] | None
    count: Count
    loss: Loss
    autocast: Callable[[], Any]
    stop_requested: Callable[[], bool]

    def __call__(self, model: nn.Module) -> dict[str, float] | None:
        """Every sample once, in order. None when a stop was requested on the way: all ranks leave at the same batch.
        Collective; every rank does the same number of forwards."""
        source = self.make_source()
        batches = Batches(
            source,
            start_step=0,
            steps=source.num_steps,
            collate=self.collate,
            count=self.count,
            workers=self.workers,
            device=self.ranks.device,
        )
        model.eval()
        try:
            with batches:
                return self._mean(model, batches, source.num_steps)
        finally:
            model.train()

    def _mean(self, model: nn.Module, batches: Batches, num_steps: int | None) -> dict[str, float] | None:
        total, counted = 0.0, 0.0
        for step in itertools.count(1) if num_steps is None else range(1, num_steps + 1):
            micro_batches = batches.next(step, self.stop_requested)
            # Asked before the forwards: a rank that waits for data in vain must not leave the others alone in them.
            stops = float(micro_batches is None or self.stop_requested())
            samples = sum(micro.weight for micro in micro_batches or ())
            stop, samples_left = self.ranks.all_reduce([stops, float(samples)])
            if stop or micro_batches is None:
                return None
            if not samples_left:
                break
            with torch.no_grad(), self.autocast():
                for micro in micro_batches:
                    part, number = self.loss(forward(model, micro.batch), micro.batch, micro.count)
                    if micro.weight and number:
                        total, counted = total + float(part), counted + number
        total, counted = self.ranks.all_reduce([total, counted])
        if not counted:
            raise UsageError("data.eval: the counts add up to 0 over the whole data set: nothing to take a mean over")
        return {"loss": total / counted}
