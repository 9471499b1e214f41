"""From the config's data sets to what this rank reads in training and in evaluations, and how that is put for a person.

Built on every rank with the same random numbers; what a data set is shows only now, so what does not fit is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from dtrain.cluster.errors import UsageError
from dtrain.runtime import targets
from dtrain.runtime.config import RunConfig
from dtrain.runtime.data import BatchPlan, MapSource, PassPlan, Source, check_dataset, seed_everything
from dtrain.runtime.ranks import Ranks
from dtrain.runtime.targetconfig import Target


def training_source(
    config: RunConfig, ranks: Ranks, start_step: int, place: Mapping[str, Any]
) -> tuple[Source, list[str]]:
    """What training reads after `start_step`, and what there is to say about it. `place`: as the checkpoint of that
    step holds it, empty at the beginning. Raises UsageError."""
    dataset = _build(config, config.data.train, "data.train")
    num_samples = check_dataset(dataset, "data.train")
    plan = BatchPlan(
        num_samples,
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        rank=ranks.global_rank,
        world_size=ranks.world_size,
        micro_batch=config.train.micro_batch,
        start_step=start_step,
        start_position=int(place.get("position", 0)),
    )
    steps = config.train.steps
    epochs = steps * config.data.batch_size / num_samples
    source = MapSource(dataset, plan, seed=config.train.seed, key="data.train")
    return source, [f"data      {num_samples:,} samples, {steps} steps = {epochs:.2f} epochs"]


def evaluation_source(config: RunConfig, ranks: Ranks) -> Callable[[], Source] | None:
    """Makes what one evaluation reads: every sample of data.eval once. None where there is nothing to evaluate on.
    Raises UsageError now, not after hours."""
    if config.data.eval is None:
        return None
    dataset = _build(config, config.data.eval, "data.eval")
    plan = PassPlan(
        check_dataset(dataset, "data.eval"),
        batch_size=config.data.batch_size,
        rank=ranks.global_rank,
        world_size=ranks.world_size,
        micro_batch=config.train.micro_batch,
    )
    return lambda: MapSource(dataset, plan, seed=config.train.seed, num_steps=plan.num_steps, key="data.eval")


def _build(config: RunConfig, target: Target, key: str) -> Any:
    """A data set may draw random numbers to build itself (a split): the same ones in every layout and attempt."""
    seed_everything(config.train.seed, 0xDA7A)
    dataset = targets.build(target)
    if isinstance(dataset, IterableDataset):
        raise UsageError(f"{key}: {type(dataset).__name__} is an IterableDataset; a map-style Dataset is needed")
    return dataset
