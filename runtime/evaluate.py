"""The mean loss over a whole data set, spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dtrain.runtime.data import Batches, BatchPlan, Count, check_dataset
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.task import Loss, forward
from torch import nn


def evaluate(
    model: nn.Module,
    dataset: Any,
    ranks: Ranks,
    *,
    batch_size: int,
    micro_batch: int | None,
    collate: Callable[[list[Any]], Any] | None,
    count: Count,
    loss: Loss,
    autocast: Callable[[], Any],
    stop_requested: Callable[[], bool],
) -> dict[str, float] | None:
    """Every sample once, in order. None when a stop was requested on the way: all ranks leave at the same batch.
    Collective."""
    remaining = check_dataset(dataset, "data.eval")
    total, counted = 0.0, 0.0
    model.eval()
    try:
        first = 0
        while first < remaining:
            size = min(batch_size, remaining - first)
            plan = BatchPlan(
                remaining,
                batch_size=size,
                seed=0,
                shuffle=False,
                rank=ranks.global_rank,
                world_size=ranks.world_size,
                micro_batch=micro_batch,
                start_position=first,
            )
            batches = Batches(
                dataset,
                plan,
                seed=0,
                start_step=0,
                steps=1,
                collate=collate,
                count=count,
                workers=0,
                device=ranks.device,
            )
            micro_batches = batches.next(1, lambda: False)
            assert micro_batches is not None
            with torch.no_grad(), autocast():
                for micro in micro_batches:
                    part, number = loss(forward(model, micro.batch), micro.batch, micro.count)
                    if micro.weight:
                        total, counted = total + float(part), counted + number
            first += size
            (stop,) = ranks.all_reduce([float(stop_requested())])
            if stop:
                return None
        total, counted = ranks.all_reduce([total, counted])
        return {"loss": total / counted}
    finally:
        model.train()
