"""Between the training loop and the checkpoints: when a save is due, what goes into it, and how state comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.cluster.errors import CheckpointError, StorageError
from dtrain.cluster.storage import Storage
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.checkpoint.manifest import Manifest
from dtrain.runtime.checkpoint.read import read_manifest
from dtrain.runtime.checkpoint.share import load_shared
from dtrain.runtime.config import Interval
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.report import Reporter
from dtrain.strategies.protocol import Wrapped

# Of the JSON state; what is left says where the data were.
_NOT_PLACE = ("step", "optimizer", "early_stop", "loss_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    step: int
    place: dict[str, Any]  # in the data: what Source.place() gave
    world_size: int
    strategy: str
    early_stop: dict[str, Any] | None  # history of the evaluations, as evaluations.py saved it


class CheckpointSaves:
    """Keeps trainer.Saves. A periodic save that fails is reported and the run goes on; two in a row, or a failed last
    one, are an error: a run must not end as if its state were safe."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        wrapped: Wrapped,
        report: Reporter,
        *,
        every: Interval | None,
        also_at: Callable[[int], bool] = lambda step: False,
        resumed: tuple[int, int] = (0, 0),
        rank: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`also_at`: steps that are saved whatever `every` says. `resumed`: (step, attempt) of the checkpoint that this
        attempt goes on from."""
        self._checkpointer = checkpointer
        self._wrapped = wrapped
        self._report = report
        self._every = every or Interval()
        self._also_at = also_at
        self._saved = dict([resumed])  # step -> the attempt that saved it
        self._attempt = checkpointer.attempt
        self._rank = rank
        self._clock = clock
        self._last = clock()
        self._failed = False

    def due(self, step: int) -> bool:
        if self._also_at(step):
            return True
        if self._every.steps is not None:
            return step % self._every.steps == 0
        return self._every.seconds is not None and self._clock() - self._last >= self._every.seconds

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Returns when the state has been copied: training may go on."""
        self._settle(last=False)
        specs, local, values = self._wrapped.state.canonical()
        mine: dict[str, Any] = {"step": step, "optimizer": values}
        if self._wrapped.loss_scale:
            mine["loss_scale"] = self._wrapped.loss_scale.state()
        self._checkpointer.save(step, specs, local, {**state, **mine})
        self._last = self._clock()
        self._saved = {step: self._attempt}

    def rate(self, step: int, metrics: Mapping[str, float]) -> None:
        if step in self._saved:
            self._checkpointer.rate(step, self._saved[step], metrics)

    def wait(self) -> None:
        self._settle(last=True)

    def _settle(self, *, last: bool) -> None:
        try:
            self._checkpointer.wait()
        except (CheckpointError, StorageError) as error:
            if last or self._failed:
                raise
            self._failed = True
            if self._rank == 0:  # it commits, so it knows of everybody's failures
                self._report.event("checkpoint_failed", message=str(error))
        else:
            self._failed = False


def restore(storage: Storage, step: int, attempt: int, wrapped: Wrapped, ranks: Ranks) -> Restored:
    """Fills model and optimizer from one committed checkpoint. Collective.

    Raises CheckpointError; CorruptCheckpoint on every rank together."""
    manifest: Manifest = read_manifest(storage, step, attempt)
    saved = {name: (tensor.dtype, tensor.shape) for name, tensor in manifest.tensors.items()}
    state: dict[str, Any] = manifest.state
    wrapped.state.load(
        saved,
        state["optimizer"],
        lambda specs, requests: load_shared(
            storage, manifest, specs, requests, rank=ranks.global_rank, world_size=ranks.world_size
        ),
    )
    if wrapped.loss_scale and "loss_scale" in state:  # it may have been saved in another precision
        wrapped.loss_scale.load(state["loss_scale"])
    return Restored(
        step=step,
        place={key: value for key, value in state.items() if key not in _NOT_PLACE},
        world_size=manifest.world_size,
        strategy=str(manifest.strategy.get("name")),
        early_stop=state.get("early_stop"),
    )
