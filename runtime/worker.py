"""One rank, from its environment to its exit code: join, build, restore, train, leave.

Started by the agent, warm (forked) or plainly; knows nothing of schedulers. Exit codes: cluster/exits.py.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.cluster import exits
from dtrain.cluster.errors import UsageError
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.storage import Storage, open_storage
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime import targets
from dtrain.runtime.batches import Batches
from dtrain.runtime.build import Chosen, build, has_batch_statistics
from dtrain.runtime.checkpoint.checkpointer import Checkpointer, Committed
from dtrain.runtime.checkpoint.scores import BestRule
from dtrain.runtime.config import RunConfig, parse_interval, read_run_config
from dtrain.runtime.data import DataError, seed_everything
from dtrain.runtime.evaluate import Evaluation
from dtrain.runtime.evaluations import Evaluations, is_due
from dtrain.runtime.metrics import MetricsLog
from dtrain.runtime.mirroring import before_commit
from dtrain.runtime.pretrained import initialize, initialized_event, initialized_lines
from dtrain.runtime.progress import Phase, ProgressWriter
from dtrain.runtime.ranks import Ranks, process_group
from dtrain.runtime.report import Reporter
from dtrain.runtime.saving import CheckpointSaves, Restored, restore
from dtrain.runtime.schedules import make_schedule
from dtrain.runtime.shares import num_micro_batches
from dtrain.runtime.sources import evaluation_source, training_source
from dtrain.runtime.stopflag import stop_flag
from dtrain.runtime.targetlist import refuse_faulty
from dtrain.runtime.task import Task, autocast, make_task
from dtrain.runtime.tracking.feed import TrackerFeed
from dtrain.runtime.trainer import Outcome, Training, train
from dtrain.strategies.caps import CAPS
from dtrain.strategies.protocol import Wrapped
from dtrain.strategies.step import NonFinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this rank is and through what it talks."""

    env: WorkerEnv
    run: RunDir
    storage: Storage
    ranks: Ranks
    progress: ProgressWriter
    report: Reporter
    stop_requested: Callable[[], bool]


def main(env: WorkerEnv) -> int:
    """Never raises: what goes wrong is reported and becomes an exit code."""
    stop = _stop_flag()
    report = Reporter(env.report_fd)
    progress = ProgressWriter(env.progress_fd, attempt=env.attempt, global_rank=env.global_rank)
    try:
        return _run(env, stop, progress, report)
    except BaseException as error:
        return report_failure(error, report)


def _stop_flag() -> Callable[[], bool]:
    """SIGTERM sets a flag, nothing more. SIGINT belongs to the launching process; where this is the launching process
    (`launch --here`) it has set a handler of its own, which stays."""
    flag = stop_flag()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return flag.is_set


def _run(env: WorkerEnv, stop: Callable[[], bool], progress: ProgressWriter, report: Reporter) -> int:
    run = RunDir(env.run_dir)
    config, strategy_config = read_run_config(run.config)
    storage = open_storage(config.checkpoint.url)
    with process_group(env) as ranks:
        place = Place(
            env=env, run=run, storage=storage, ranks=ranks, progress=progress, report=report, stop_requested=stop
        )
        refuse_faulty(config)
        wrapped, chosen = build(config, strategy_config, ranks, env.num_nodes)
        outcome = _train(config, place, wrapped, chosen)
        if outcome is Outcome.DONE:
            _finish(config, place, wrapped)
        wrapped.close()
    return exits.DONE if outcome is Outcome.DONE else exits.STOPPED


def _train(config: RunConfig, place: Place, wrapped: Wrapped, chosen: Chosen) -> Outcome:
    env, ranks = place.env, place.ranks
    schedule = make_schedule(
        config.schedule, wrapped.optimizer, config.train.steps, env.resume_step, config.optimizer.groups
    )
    restored = _restore(place, wrapped)
    weights = [] if restored else _initialize(config, place, wrapped, chosen)
    start_step = restored.step if restored else 0
    source, data_lines = training_source(
        config,
        wrapped.data,
        start_step,
        restored.place if restored else {},
        gather=ranks.gather,
        stop_requested=place.stop_requested,
    )
    if ranks.global_rank == 0:
        lines = [*describe(config, chosen, data_lines, env, wrapped), *weights]
        place.report.event("chosen", strategy=chosen.strategy, why=chosen.why, lines=lines)
    parts = _parts(config, place, wrapped, chosen)
    batches = Batches(
        source,
        start_step=start_step,
        steps=config.train.steps,
        collate=parts.collate,
        count=parts.task.count,
        workers=config.data.workers,
        device=ranks.device,
    )
    metrics = MetricsLog(place.run.metrics, start_step) if ranks.global_rank == 0 else None
    evaluations = _evaluations(config, place, wrapped, parts, restored)
    with batches, _tracking(config, place, start_step):
        return train(
            Training(
                config=config.train,
                wrapped=wrapped,
                schedule=schedule,
                batches=batches,
                task=parts.task,
                autocast=parts.autocast,
                ranks=ranks,
                saves=_saves(config, place, wrapped, chosen),
                evaluations=evaluations,
                metrics=metrics,
                progress=place.progress,
                report=place.report,
                stop_requested=place.stop_requested,
                attempt=env.attempt,
                start_step=start_step,
                batch_size=config.data.batch_size,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What training and evaluation share."""

    task: Task
    collate: Callable[[list[Any]], Any] | None
    autocast: Callable[[], Any]


def _parts(config: RunConfig, place: Place, wrapped: Wrapped, chosen: Chosen) -> _Parts:
    device = place.ranks.device
    return _Parts(
        task=make_task(config, wrapped.module, device),
        collate=targets.as_callable(config.data.collate) if config.data.collate else None,
        autocast=autocast(
            config.train.precision, device, cache=not CAPS[chosen.strategy].gathered and not config.train.exact
        ),
    )


def _evaluations(
    config: RunConfig, place: Place, wrapped: Wrapped, parts: _Parts, restored: Restored | None
) -> Evaluations | None:
    evaluation = _evaluation(config, place, wrapped, parts)
    if evaluation is None:
        return None
    train, best, start_step = config.train, config.checkpoint.best, place.env.resume_step
    # One that is due at the step that the run goes on from is done again: it may have been interrupted.
    kept = start_step - 1 if is_due(train, start_step) else start_step
    return Evaluations(
        evaluation,
        train,
        wanted={
            **({"train.early_stop.metric": train.early_stop.metric} if train.early_stop else {}),
            **({"checkpoint.best.metric": best.metric} if best else {}),
        },
        attempt=place.env.attempt,
        report=place.report,
        log=MetricsLog(place.run.evaluations, kept) if place.ranks.global_rank == 0 else None,
        history=restored.early_stop if restored else None,
    )


def _evaluation(config: RunConfig, place: Place, wrapped: Wrapped, parts: _Parts) -> Evaluation | None:
    make_source = evaluation_source(config, wrapped.data, place.stop_requested)
    if make_source is None:
        return None
    return Evaluation(
        make_source=make_source,
        ranks=place.ranks,
        data=wrapped.data,
        passes=wrapped.passes,
        seed=config.train.seed,
        workers=config.data.workers,
        collate=parts.collate,
        task=parts.task,
        metrics=targets.as_callable(config.metrics) if config.metrics else None,
        autocast=parts.autocast,
        stop_requested=place.stop_requested,
    )


def _restore(place: Place, wrapped: Wrapped) -> Restored | None:
    env = place.env
    if not env.resume_step:
        return None
    place.progress.phase(Phase.RESTORING)
    restored = restore(place.storage, env.resume_step, env.resume_attempt, wrapped, place.ranks)
    if env.global_rank == 0:
        place.report.event(
            "resumed",
            step=restored.step,
            from_attempt=env.resume_attempt,
            strategy=restored.strategy,
            world_size=restored.world_size,
        )
    return restored


def _initialize(config: RunConfig, place: Place, wrapped: Wrapped, chosen: Chosen) -> list[str]:
    """The weights that a run starts from where its config names some, and what to tell of them."""
    if config.model.init_from is None:
        return []
    place.progress.phase(Phase.RESTORING)
    found = initialize(config.model.init_from, wrapped.module, wrapped.state, place.ranks, chosen.names_from_files)
    if place.ranks.global_rank == 0:
        place.report.event("initialized", **initialized_event(found))
    return initialized_lines(found)


def _saves(config: RunConfig, place: Place, wrapped: Wrapped, chosen: Chosen) -> CheckpointSaves:
    env, best = place.env, config.checkpoint.best

    def on_commit(done: Committed) -> None:
        place.report.event("checkpoint_committed", step=done.step, bytes=done.bytes, seconds=round(done.seconds, 3))

    checkpointer = Checkpointer(
        place.storage,
        attempt=env.attempt,
        rank=env.global_rank,
        world_size=env.world_size,
        strategy={"name": chosen.strategy},
        board=place.ranks.board,
        on_commit=on_commit,
        keep=config.checkpoint.keep,
        before_commit=before_commit(place.run),
        best=BestRule(metric=best.metric, mode=best.mode, keep=best.keep) if best else None,
    )
    every = parse_interval(config.checkpoint.every) if config.checkpoint.every is not None else None
    return CheckpointSaves(
        checkpointer,
        wrapped,
        place.report,
        every=every,
        also_at=lambda step: best is not None and is_due(config.train, step),
        resumed=(env.resume_step, env.resume_attempt),
        rank=env.global_rank,
    )


def _tracking(config: RunConfig, place: Place, start_step: int) -> AbstractContextManager[object]:
    if not config.track or place.ranks.global_rank:
        return nullcontext()

    def tell(message: str) -> None:
        place.report.event("tracking", message=message)

    return TrackerFeed(place.run.path, config.track, start_step, tell)


def _finish(config: RunConfig, place: Place, wrapped: Wrapped) -> None:
    """The user's on_end, on every rank: a sharded model's forward needs them all. Rank 0's word counts."""
    if config.on_end is None:
        return
    place.progress.phase(Phase.FINISHING)
    seed_everything(config.train.seed, 0xE4D)
    wrapped.module.eval()
    with torch.no_grad():
        result: Any = targets.as_callable(config.on_end)(wrapped.module)
    if place.ranks.global_rank == 0 and result is not None:
        place.report.event("result", text=str(result))


def describe(config: RunConfig, chosen: Chosen, data_lines: list[str], env: WorkerEnv, wrapped: Wrapped) -> list[str]:
    """What was chosen and why, for a person."""
    batch = config.data.batch_size
    each = -(-batch // wrapped.data.world_size)
    device = torch.cuda.get_device_name() if env.device.startswith("cuda") else "CPU"
    pieces = config.train.exact.shards if config.train.exact else wrapped.data.world_size
    parts = num_micro_batches(batch, pieces, config.train.micro_batch) * (wrapped.shards.most if wrapped.shards else 1)
    accumulation = f", in {parts} micro-batches" if parts > 1 else ""
    frozen = f" ({chosen.num_frozen:,} frozen)" if chosen.num_frozen else ""
    lines = [
        f"model     {chosen.num_parameters:,} parameters{frozen}, {', '.join(_computing(config))}",
        f"strategy  {chosen.strategy} over {env.world_size} x {device}{chosen.copies} ({chosen.why})",
        *(f"          {note}" for note in wrapped.notes),
        f"batch     {batch} samples a step, up to {each} a rank{accumulation}",
        *data_lines,
    ]
    if wrapped.shards:
        threads = "" if env.device.startswith("cuda") else ", each computed with one thread"
        lines.append(
            f"exact     {wrapped.shards.num} logical shards a step, up to {wrapped.shards.most} a rank{threads}"
        )
    if has_batch_statistics(wrapped.module):
        lines.append("note      batch-norm statistics are those of rank 0's samples: the curve depends on the layout")
    return lines


def _computing(config: RunConfig) -> list[str]:
    """In what numbers and how the forward computes."""
    train = config.train
    words: list[str] = [train.precision]
    if train.activation_checkpointing != "none":
        words.append(f"activation checkpointing {train.activation_checkpointing}")
    return [*words, "compiled"] if train.compile else words


def report_failure(error: BaseException, report: Reporter) -> int:
    """What the exception does not say itself; report.py classifies the rest. The node's log gets the traceback."""
    traceback.print_exception(error)
    if isinstance(error, NonFinite):
        report.failure(error, kind="nonfinite", victim=not error.here)
    elif isinstance(error, DataError):
        report.failure(error, where=error.where)
    elif isinstance(error, UsageError):
        report.failure(error, kind="config")
        return exits.NEVER_RETRY
    else:
        report.failure(error)
    return exits.FAILED


if __name__ == "__main__":
    import os

    sys.exit(main(WorkerEnv.from_environ(os.environ)))
