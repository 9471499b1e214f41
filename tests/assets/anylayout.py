"""Layouts that save, and layouts that go on from what others saved: run by rank_functions.py, on a small model.

LAYOUTS is the list of all of them, a row each: what a strategy is asked for, and over how many ranks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dtrain.cluster.filestore import FileStorage
from dtrain.runtime.batches import Batches
from dtrain.runtime.build import build
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.config import RunConfig, read_run_config
from dtrain.runtime.data import seed_everything
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.saving import restore
from dtrain.runtime.schedules import make_schedule
from dtrain.runtime.sources import training_source
from dtrain.runtime.task import autocast, make_task
from dtrain.strategies.protocol import StepOptions, Wrapped
from dtrain.strategies.step import run_step

SAVED = 3  # the step that is saved
STEPS = 5

LAYOUTS: dict[str, tuple[str, int]] = {
    "single": ("single", 1),
    "ddp-2": ("ddp", 2),
    "ddp-3": ("ddp", 3),
    "fsdp-2": ("fsdp", 2),
    "fsdp-3": ("fsdp", 3),
    "hsdp-4": ("{name: fsdp, replicate: 2}", 4),
    "interleaved-2": ("{name: ddp, pipeline: 2, pipeline_schedule: interleaved}", 2),
    "fsdp-pipeline-4": ("{name: fsdp, pipeline: 2}", 4),
    "tensor-2": ("{name: ddp, tensor: 2}", 2),
    "tensor-pipeline-4": (
        "{name: ddp, pipeline: 2, pipeline_schedule: interleaved, tensor: 2, sequence_parallel: true}",
        4,
    ),
    "fsdp-tensor-4": ("{name: fsdp, tensor: 2, sequence_parallel: true}", 4),
}
if importlib.util.find_spec("deepspeed"):  # as test_zero.py says
    LAYOUTS |= {"zero1-3": ("zero1", 3), "zero2-2": ("{name: zero2, offload: cpu}", 2), "zero3-3": ("zero3", 3)}
if importlib.util.find_spec("horovod"):  # where it must be there, test_horovod.py says so
    LAYOUTS["horovod-3"] = ("horovod", 3)
# Where sums come in another order than in one process: what two steps may differ by, relative.
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    ranks: Ranks
    config: RunConfig
    wrapped: Wrapped


def _job(ranks: Ranks, folder: str) -> _Job:
    config, strategy = read_run_config(Path(folder) / "config.yaml")
    wrapped, _ = build(config, strategy, ranks, nodes=1)
    return _Job(ranks=ranks, config=config, wrapped=wrapped)


def save(ranks: Ranks, folder: str) -> list[list[float | None]]:
    """[loss, norm] of each step; the state after step SAVED is in `folder`/checkpoints."""
    job = _job(ranks, folder)
    return _train(job, 0, lambda step: _save(job, folder) if step == SAVED else None)


def go_on(ranks: Ranks, folder: str, sources: list[str], trained: list[str]) -> dict[str, list[list[float | None]]]:
    """Loads from each of the `sources`, folders of save(), and saves that again at once, in `folder`/<name of the
    source>/checkpoints. From those that are `trained`: [loss, norm] of the steps after SAVED; their jobs are new. The
    others are loaded over a job that has trained, so that nothing is right by chance that was not filled."""
    found: dict[str, list[list[float | None]]] = {}
    used: _Job | None = None
    for source in sorted(map(Path, sources), key=lambda source: source.name not in trained):
        job = used if used and source.name not in trained else _job(ranks, folder)
        restore(FileStorage(str(source / "checkpoints")), SAVED, 1, job.wrapped, ranks)
        _save(job, str(Path(folder) / source.name))
        found[source.name] = _train(job, SAVED) if source.name in trained else []
        used = job
    return found


def _save(job: _Job, folder: str) -> None:
    checkpointer = Checkpointer(
        FileStorage(str(Path(folder) / "checkpoints")),
        attempt=1,
        rank=job.ranks.global_rank,
        world_size=job.ranks.world_size,
        strategy={"name": "test"},
        board=job.ranks.board,
        on_commit=lambda _: None,
        keep=None,
    )
    specs, local, values = job.wrapped.state.canonical()
    checkpointer.save(SAVED, specs, local, {"position": SAVED * job.config.data.batch_size, "optimizer": values})
    checkpointer.wait()
    job.ranks.all_reduce([0.0])  # rank 0 has committed


def _train(job: _Job, done: int, after: Callable[[int], None] = lambda step: None) -> list[list[float | None]]:
    config, wrapped, ranks = job.config, job.wrapped, job.ranks
    place = {"position": done * config.data.batch_size} if done else {}
    schedule = make_schedule(config.schedule, wrapped.optimizer, config.train.steps, done, config.optimizer.groups)
    source, _ = training_source(config, wrapped.data, done, place, gather=ranks.gather, stop_requested=lambda: False)
    task = make_task(config, wrapped.module, ranks.device)
    batches = Batches(
        source, start_step=done, steps=STEPS, collate=None, count=task.count, workers=0, device=ranks.device
    )
    wrapped.module.train()
    found = []
    for step in range(done + 1, STEPS + 1):
        micro_batches = batches.next(step, lambda: False)
        assert micro_batches is not None
        mine = sum(micro.count for micro in micro_batches) if wrapped.data.counts else 0.0
        schedule.set_rate(step)
        seed_everything(config.train.seed, step, wrapped.data.rank)
        options = StepOptions(
            total_count=ranks.all_reduce([mine])[0],
            clip_grad_norm=config.train.clip_grad_norm,
            autocast=autocast(config.train.precision, torch.device("cpu"), cache=False),
            forward=task.forward,
            loss=task.loss,
            all_reduce=ranks.all_reduce,
        )
        result = run_step(wrapped, micro_batches, options)
        found.append([result.loss, result.grad_norm])
        after(step)
    return found
