"""The mean loss, and the means of the user's own metrics, over a whole data set that is spread over the ranks.

When that happens and what follows from it: evaluations.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dtrain.cluster.errors import UsageError
from dtrain.runtime.batches import Batches
from dtrain.runtime.data import Source, seed_everything
from dtrain.runtime.means import Means, sums_of
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.task import Task
from dtrain.strategies.degrees import DataRank
from dtrain.strategies.protocol import MicroBatch, Passes

Metrics = Callable[[Any, Any], Any]  # (output, batch) -> {name: number or (sum, count)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation needs besides the model; the same at every step."""

    make_source: Callable[[], Source]  # of one pass
    ranks: Ranks
    data: DataRank
    passes: Passes
    seed: int
    workers: int
    collate: Callable[[list[Any]], Any] | None
    task: Task
    metrics: Metrics | None
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
            count=self.task.count,
            workers=self.workers,
            device=self.ranks.device,
        )
        with batches, _in_eval_mode(model):
            return self._means(model, batches, source.num_steps)

    def _means(self, model: nn.Module, batches: Batches, num_steps: int | None) -> dict[str, float] | None:
        means = Means()
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
            # A model may draw numbers in eval mode: the same ones in every evaluation, and when one is repeated.
            seed_everything(self.seed, 0xE7A1, step, self.data.rank)
            for micro in micro_batches:
                with torch.no_grad(), self.autocast(), _naming(step, micro):
                    measure = partial(self._measure, micro)
                    found = self.passes.evaluate(model, micro, self.task.forward, measure)
                    means.add(found, counts=micro.weight > 0 and self.data.counts)
        sums = means.reduce(self.ranks.all_reduce)
        if not sums.get("loss", (0.0, 0.0))[1]:
            raise UsageError("data.eval: the counts add up to 0 over the whole data set: nothing to take a mean over")
        return {name: total / count if count else math.nan for name, (total, count) in sums.items()}

    def _measure(self, micro: MicroBatch, output: Any) -> dict[str, tuple[float, float]]:
        total, count = self.task.loss(output, micro.batch, micro.count)
        own = sums_of(self.metrics(output, micro.batch), micro.count) if self.metrics else {}
        return {"loss": (float(total), count), **own}


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Afterwards each part is in the mode that it was in: some may be frozen in eval mode on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train()  # a model may have overridden it
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _naming(step: int, micro: MicroBatch) -> Iterator[None]:
    """An error of the user's code in an evaluation says on which batch, and that the model was in eval mode."""
    samples = f"samples {list(micro.indices[:16])}" if micro.indices else "a borrowed sample, which does not count"
    place = f"on batch {step} of data.eval ({samples}), the model in eval mode"
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{error} (found {place})") from error
    except Exception as error:
        error.add_note(f"({place})")
        raise
