"""What a training script may tell dtrain and ask of it, a line each: progress and numbers, whether to stop, where its
checkpoints go. Outside dtrain (plain python, torchrun) the same calls print or do nothing.

    from dtrain.runtime import session

Torch-free until a question is put to all ranks. Saving and loading: dtrain.runtime.checkpoint.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from dtrain.cluster import exits
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.metrics import MetricsLog
from dtrain.runtime.progress import ProgressWriter
from dtrain.runtime.report import Reporter
from dtrain.runtime.scriptconfig import ScriptRunConfig
from dtrain.runtime.stopflag import stop_flag
from dtrain.runtime.tracking.feed import TrackerFeed


@dataclass(slots=True, kw_only=True)
class Attached:
    """This process as a rank of a dtrain run."""

    env: WorkerEnv
    checkpoint_url: str
    report: Reporter
    progress: ProgressWriter
    track: tuple[str, ...]
    pid: int
    metrics: MetricsLog | None = None  # rank 0's, from the first report on
    trackers: TrackerFeed | None = None


@dataclass(slots=True)
class _Newest:
    step: int = 0
    at: float = 0.0  # time.monotonic()


_attached: Attached | None = None
_newest = _Newest()


def attach(env: WorkerEnv, config: ScriptRunConfig, report: Reporter, progress: ProgressWriter) -> None:
    """Called by runtime/script.py before the script begins."""
    global _attached
    _attached = Attached(
        env=env,
        checkpoint_url=config.checkpoint.url,
        report=report,
        progress=progress,
        track=config.track,
        pid=os.getpid(),
    )
    _newest.step, _newest.at = 0, time.monotonic()


def close() -> None:
    """Called by runtime/script.py after the script's end: what it has reported is delivered."""
    place = attached()
    if place is not None and place.trackers is not None:
        place.trackers.close()


def attached() -> Attached | None:
    """None outside dtrain, and in processes that a rank has forked: they are not the rank."""
    return _attached if _attached is not None and _attached.pid == os.getpid() else None


def report(step: int, **metrics: Any) -> None:
    """Step `step` is finished: once a step, on every rank; steps grow, from 1. Rank 0's numbers (anything that float()
    takes; `loss` and `lr` are shown) go to metrics.jsonl; outside dtrain they are printed.

    A restart counts as progress, and a hang is noticed, by these words. Raises ValueError.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step <= _newest.step:
        raise ValueError(f"report({step!r}): steps are whole numbers that grow; the one before was {_newest.step}")
    numbers = _numbers(metrics)
    seconds, _newest.at = time.monotonic() - _newest.at, time.monotonic()
    first, _newest.step = _newest.step == 0, step
    place = attached()
    if place is None:
        _print_as_line(step, numbers)
        return
    place.progress.step(step + 1)
    if place.env.global_rank == 0:
        timing = {} if first else {"step_s": round(seconds, 6)}
        _metrics(place, step).write({"step": step, "attempt": place.env.attempt, **timing, **numbers})


def _metrics(place: Attached, step: int) -> MetricsLog:
    """Opened by the first step that this attempt reports: from there on it replaces what was there before."""
    if place.metrics is None:
        run = RunDir(place.env.run_dir)
        place.metrics = MetricsLog(run.metrics, step - 1)
        if place.track:
            place.trackers = TrackerFeed(
                run.path, place.track, step - 1, lambda message: place.report.event("tracking", message=message)
            )
    return place.metrics


def stop_requested(*, agree: bool = True) -> bool:
    """Whether this run was asked to stop (SIGTERM): then save, and end with `exit_stopped()`. From the first call on
    a SIGTERM is kept in mind instead of ending the process.

    With `agree` and a process group the answer is the same on all ranks, True where one of them was asked; every rank
    has to call it as often as the others. Without, it is this rank's own.
    """
    asked = stop_flag().is_set()
    return _any_rank(asked) if agree else asked


def exit_stopped() -> NoReturn:
    """Ends the process with 85: stopped on request, its state is saved, start me again."""
    sys.exit(exits.STOPPED)


def checkpoint_url(otherwise: str = "checkpoints") -> str:
    """checkpoint.url of the run's config; outside dtrain what the caller gives."""
    place = attached()
    return otherwise if place is None else place.checkpoint_url


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: _number(name, value) for name, value in metrics.items()}


def _number(name: str, value: Any) -> float:
    if name == "attempt":
        raise ValueError("report(attempt=...): this name is taken, every record has it")
    try:
        return value if type(value) is int else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"report({name}=...): expects a number, found {type(value).__name__}") from error


def _print_as_line(step: int, numbers: dict[str, float]) -> None:
    if os.environ.get("RANK", "0") == "0":
        print("  ".join([f"step {step}", *(f"{name} {value:.6g}" for name, value in numbers.items())]), flush=True)


def _any_rank(asked: bool) -> bool:
    """Whether it is true on any rank of the default process group; no group: this rank's own."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return asked
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor([int(asked)], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())
