"""The training loop: steps, stops, evaluations and saves. Everything that it uses is handed to it, built.

One small sum over all ranks opens every step: whether somebody was asked to stop, whether a save is due, and what the
loss is a mean over. So ranks agree without a collective in a signal handler, and without one more message.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch

from dtrain.runtime.batches import Batches
from dtrain.runtime.buffers import SharedBuffers
from dtrain.runtime.config import TrainConfig
from dtrain.runtime.data import count_tokens, seed_everything
from dtrain.runtime.evaluations import Evaluations
from dtrain.runtime.metrics import MetricsLog
from dtrain.runtime.progress import Phase, ProgressWriter
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.report import Reporter
from dtrain.runtime.schedules import Schedule
from dtrain.runtime.task import Task
from dtrain.strategies.protocol import MicroBatch, StepOptions, StepResult, Wrapped
from dtrain.strategies.step import NonFinite, run_step


class Outcome(Enum):
    DONE = "done"
    STOPPED = "stopped"


class Saves(Protocol):
    """When and how state is kept; see saving.py."""

    def due(self, step: int) -> bool: ...

    def save(self, step: int, state: dict[str, Any]) -> None:
        """`state`: what goes into the checkpoint besides model and optimizer, as JSON."""

    def rate(self, step: int, metrics: Mapping[str, float]) -> None:
        """What an evaluation of `step` gave; kept with its checkpoint, where it has one."""

    def wait(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    config: TrainConfig
    wrapped: Wrapped
    schedule: Schedule
    batches: Batches
    task: Task
    autocast: Callable[[], Any]
    ranks: Ranks
    saves: Saves
    evaluations: Evaluations | None
    metrics: MetricsLog | None  # on global rank 0
    progress: ProgressWriter
    report: Reporter
    stop_requested: Callable[[], bool]
    attempt: int
    start_step: int
    batch_size: int
    saved: list[int] = field(default_factory=list)


def train(job: Training) -> Outcome:
    """Runs the steps after `start_step`. Raises what the user's code raised, and NonFinite. Collective."""
    job.wrapped.module.train()
    buffers = SharedBuffers(job.wrapped.module, job.ranks, job.wrapped.degrees)
    # A stop during an evaluation, or a failure, may have kept this one from its end: the save came before it.
    if job.start_step and (outcome := _evaluate(job, job.start_step)):
        return outcome
    for step in range(job.start_step + 1, job.config.steps + 1):
        began = time.perf_counter()
        job.progress.step(step)
        job.progress.phase(Phase.DATA)
        micro_batches = job.batches.next(step, job.stop_requested)
        stop, save_due, count = _agree(job, step, micro_batches)
        if stop or micro_batches is None:
            return _stop(job, step - 1)
        lr = job.schedule.set_rate(step)
        seed_everything(job.config.seed, 0x57E9, step, job.wrapped.data.rank)
        result = _step(job, step, micro_batches, count, lr)
        buffers.share()
        _record(job, step, micro_batches, result, lr, time.perf_counter() - began)
        if save_due or step == job.config.steps:  # before the evaluation: it may be long
            _save(job, step)
        if outcome := _evaluate(job, step):
            return outcome
    job.progress.phase(Phase.FINISHING)
    job.saves.wait()
    return Outcome.DONE


def _agree(job: Training, step: int, micro_batches: list[MicroBatch] | None) -> tuple[bool, bool, float]:
    """(somebody stops, a save is due after this step, the count of the global batch): the same on every rank."""
    stops = float(micro_batches is None or job.stop_requested())
    due = float(job.ranks.global_rank == 0 and job.saves.due(step))
    counts = _counts(job, micro_batches or ())
    job.progress.collective()
    job.progress.phase(Phase.WAITING)  # told apart from reading data: who waits is not to blame for a hang
    stop, save_due, *totals = job.ranks.all_reduce([stops, due, *counts])
    return stop > 0, save_due > 0, math.fsum(totals)


def _counts(job: Training, micro_batches: Sequence[MicroBatch]) -> list[float]:
    """What this rank adds to the count of the global batch; in exact mode by logical shard, so that the sum does not
    depend on who has which."""
    counts = [micro.count for micro in micro_batches]
    if job.wrapped.shards:
        return job.wrapped.shards.by_shard(counts)
    return [sum(counts) if job.wrapped.data.counts else 0.0]


_PHASES = {phase.name.lower(): phase for phase in Phase}


def _step(job: Training, step: int, micro_batches: list[MicroBatch], count: float, lr: float) -> StepResult:
    options = StepOptions(
        total_count=count,
        clip_grad_norm=job.config.clip_grad_norm,
        autocast=job.autocast,
        forward=job.task.forward,
        loss=job.task.loss,
        all_reduce=job.ranks.all_reduce,
        on_phase=lambda name: job.progress.phase(_PHASES[name]),
        seed=lambda shard: seed_everything(job.config.seed, 0x57E9, step, shard),
    )
    try:
        return run_step(job.wrapped, micro_batches, options)
    except NonFinite as error:
        if job.metrics:
            loss = error.value if error.what == "loss" else None
            norm = error.value if error.what == "gradient norm" else None
            job.metrics.write({"step": step, "attempt": job.attempt, "loss": loss, "lr": lr, "grad_norm": norm})
        raise


def _record(
    job: Training, step: int, micro_batches: list[MicroBatch], result: StepResult, lr: float, step_s: float
) -> None:
    job.progress.done(step)
    if job.metrics is None:
        return
    record: dict[str, Any] = {
        "step": step,
        "attempt": job.attempt,
        "loss": float(np.float32(result.loss)),
        "lr": lr,
        "grad_norm": result.grad_norm,
        "samples_per_s": round(job.batch_size / step_s, 3),
        "step_s": round(step_s, 6),
        "memory_bytes": _peak_memory(job.ranks.device),
    }
    if result.loss_scale is not None:
        record |= {"loss_scale": result.loss_scale, **({"skipped": True} if result.skipped else {})}
    tokens = [count_tokens(micro.batch) for micro in micro_batches if micro.weight]
    samples = sum(micro.weight for micro in micro_batches)
    if tokens and all(tokens) and samples:  # every rank's samples look alike
        record["tokens_per_s"] = round(sum(t for t in tokens if t) / samples * job.batch_size / step_s, 1)
    job.metrics.write(record)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _evaluate(job: Training, step: int) -> Outcome | None:
    """Evaluates where it is due after `step`. The outcome where the run ends here: asked to stop, or stopped early."""
    evaluations = job.evaluations
    if evaluations is None or not evaluations.due(step):
        return None
    job.progress.phase(Phase.EVALUATING)
    found = evaluations.run(step, job.wrapped.module)
    job.wrapped.sync.settle()
    if found is None:
        return _stop(job, step)
    job.saves.rate(step, found)
    return _stop_early(job, step, evaluations.verdict) if evaluations.verdict and step < job.config.steps else None


def _save(job: Training, step: int) -> None:
    job.progress.phase(Phase.SAVING)
    history = job.evaluations.state() if job.evaluations else {}
    job.saves.save(step, {**job.batches.place(step), **history})
    job.saved.append(step)


def _stop(job: Training, step: int) -> Outcome:
    """`step` is done on every rank and none has begun the next."""
    _save_last(job, step)
    return Outcome.STOPPED


def _stop_early(job: Training, step: int, why: str) -> Outcome:
    _save_last(job, step)
    if job.ranks.global_rank == 0:
        job.report.event("stopped_early", step=step, reason=why)
    return Outcome.DONE


def _save_last(job: Training, step: int) -> None:
    if step > job.start_step and step not in job.saved[-1:]:
        _save(job, step)
    job.progress.phase(Phase.FINISHING)
    job.saves.wait()
