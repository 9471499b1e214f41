"""A rank of `dtrain verify`, in the place of runtime/worker.py: a few steps by the very same trainer, written down.

The run directory's Orders say how many, and what: a strategy's own rank, or the one process with which strategies that
have finished are compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from dtrain.cluster import exits
from dtrain.cluster.rundir import RunDir
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime import targets
from dtrain.runtime.batches import Batches
from dtrain.runtime.build import build, has_batch_statistics
from dtrain.runtime.config import RunConfig, read_run_config
from dtrain.runtime.data import Source
from dtrain.runtime.pretrained import initialize
from dtrain.runtime.progress import ProgressWriter
from dtrain.runtime.ranks import Ranks, process_group
from dtrain.runtime.report import Reporter
from dtrain.runtime.schedules import make_schedule
from dtrain.runtime.shares import num_micro_batches
from dtrain.runtime.sources import training_source
from dtrain.runtime.targetlist import refuse_faulty
from dtrain.runtime.task import autocast, make_task
from dtrain.runtime.trainer import Training, train
from dtrain.runtime.verify.record import Recorder, silence_dropout
from dtrain.runtime.verify.records import FACTS, GROUPED, PLAIN, RECORDS, Orders, read_run
from dtrain.runtime.verify.regroup import Groups, Regrouped
from dtrain.runtime.worker import report_failure
from dtrain.strategies.caps import CAPS
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.protocol import Wrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    env: WorkerEnv
    ranks: Ranks
    progress: ProgressWriter
    report: Reporter
    steps: int

    @property
    def folder(self) -> Path:
        return Path(self.env.run_dir)


def main(env: WorkerEnv) -> int:
    """Never raises: what goes wrong is reported and becomes an exit code."""
    report = Reporter(env.report_fd)
    try:
        _run(env, report)
    except BaseException as error:
        return report_failure(error, report)
    return exits.DONE


def _run(env: WorkerEnv, report: Reporter) -> None:
    config, strategy = read_run_config(RunDir(env.run_dir).config)
    orders = Orders.read(Path(env.run_dir))
    progress = ProgressWriter(env.progress_fd, attempt=env.attempt, global_rank=env.global_rank)
    refuse_faulty(config)
    with process_group(env) as ranks:
        place = _Place(env=env, ranks=ranks, progress=progress, report=report, steps=orders.steps)
        if orders.strategies is None:
            _train(config, strategy, place, RECORDS)
            return
        groups = [_groups_of(Path(records)) for records in orders.strategies]
        _train(config, strategy, place, PLAIN, groups=_other_groups(config, groups))
        for number, own in enumerate(groups):
            _train(config, strategy, place, GROUPED.format(number), groups=own, shaken=True)


def _train(
    config: RunConfig,
    strategy: StrategyConfig,
    place: _Place,
    name: str,
    *,
    groups: Groups | None = None,
    shaken: bool = False,
) -> None:
    """`groups`: the micro-batches to take in the place of its own. `shaken`: from weights that are changed in their
    last place; what differs from the run without that is what rounding does to this model."""
    env, ranks = place.env, place.ranks
    wrapped, chosen = build(config, strategy, ranks, env.num_nodes)
    if config.model.init_from is not None:
        initialize(config.model.init_from, wrapped.module, wrapped.state, ranks, chosen.names_from_files)
    silenced = silence_dropout(wrapped.module)
    if shaken:
        _shake(wrapped.module)
    facts = {
        "dropout": silenced,
        "batch_statistics": has_batch_statistics(wrapped.module),
        "strategy": chosen.strategy,
        "trainable": [name for name, parameter in wrapped.module.named_parameters() if parameter.requires_grad],
    }
    recorder = Recorder(
        folder=place.folder / name,
        rank=env.global_rank,
        world_size=env.world_size,
        data_rank=wrapped.data.rank,
        groups=shaken,
    )
    wrapped = recorder.attach(wrapped)
    if env.global_rank == 0:
        (place.folder / name / FACTS).write_text(json.dumps(facts))
    schedule = make_schedule(config.schedule, wrapped.optimizer, config.train.steps, 0, config.optimizer.groups)
    source = _source(config, ranks, wrapped, groups)
    task = make_task(config, wrapped.module, ranks.device)
    batches = Batches(
        source,
        start_step=0,
        steps=place.steps,
        collate=targets.as_callable(config.data.collate) if config.data.collate else None,
        count=task.count,
        workers=config.data.workers,
        device=ranks.device,
    )
    with batches:
        train(
            Training(
                config=replace(config.train, steps=place.steps),
                wrapped=wrapped,
                schedule=schedule,
                batches=batches,
                task=task,
                autocast=autocast(config.train.precision, ranks.device, cache=not CAPS[chosen.strategy].gathered),
                ranks=ranks,
                saves=recorder,
                evaluations=None,
                metrics=cast(Any, recorder),
                progress=place.progress,
                report=place.report,
                stop_requested=lambda: False,
                attempt=env.attempt,
                start_step=0,
                batch_size=config.data.batch_size,
            )
        )


def _source(config: RunConfig, ranks: Ranks, wrapped: Wrapped, groups: Groups | None) -> Source:
    source, _ = training_source(config, wrapped.data, 0, {}, gather=ranks.gather, stop_requested=lambda: False)
    return source if groups is None else Regrouped(source, groups)


def _other_groups(config: RunConfig, strategies: Sequence[Groups]) -> Groups | None:
    """Where one process would take the very micro-batches of a strategy, it takes halves of them: a loss that depends
    on how samples are put together shows only where they are put together in another way."""
    size = config.data.batch_size
    number = num_micro_batches(size, 1, config.train.micro_batch)
    own = [(n + 1) * size // number - n * size // number for n in range(number)]
    alike = next((steps for steps in strategies if [len(group) for group in steps.get(1, ())] == own), None)
    if alike is None:
        return None
    return {
        step: [half for group in groups for half in (group[: len(group) // 2], group[len(group) // 2 :]) if half]
        for step, groups in alike.items()
    }


def _groups_of(records: Path) -> dict[int, Sequence[tuple[int, ...]]]:
    return {step.number: [part.indices for part in step.parts] for step in read_run(records) if step.parts}


@torch.no_grad()
def _shake(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.dtype == torch.float32:
            signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device) * 2 - 1
            parameter.mul_(1.0 + signs * 2.0**-23)
