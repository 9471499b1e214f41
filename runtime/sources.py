"""From the config's data sets to what this rank reads in training and in evaluations, and how that is put for a person.

Built on every rank with the same random numbers; what a data set is shows only now, so what does not fit is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset

from dtrain.cluster.errors import UsageError
from dtrain.runtime import targets
from dtrain.runtime.config import STREAM_KEYWORDS, RunConfig
from dtrain.runtime.data import BatchPlan, MapSource, PassPlan, Plan, Source, check_dataset, seed_everything
from dtrain.runtime.shardplan import ShardPlan
from dtrain.runtime.shares import num_classes, samples_used, streams_of
from dtrain.runtime.streams import Opener, Stream
from dtrain.runtime.streamsource import Dealing, StreamPass, StreamSource, saved_places
from dtrain.runtime.targetconfig import Target
from dtrain.strategies.degrees import DataRank
from dtrain.strategies.exacttree import LogicalShards


def training_source(
    config: RunConfig,
    rank: DataRank,
    start_step: int,
    place: Mapping[str, Any],
    *,
    gather: Callable[[bytes], list[bytes]],
    stop_requested: Callable[[], bool],
) -> tuple[Source, list[str]]:
    """What training reads after `start_step`, and what there is to say about it. `place`: as the checkpoint of that
    step holds it, empty at the beginning. `gather`: what each rank says, on global rank 0; collective.

    Raises UsageError."""
    data, dealing = config.data, _dealing(config, rank)
    dataset, opener = _build(config, data.train, "data.train", dealing.first_stream)
    if not _is_iterable(dataset):
        return _map_source(config, rank, dataset, start_step, place)
    if config.train.exact:
        raise UsageError(
            f"train.exact: {type(dataset).__name__} is iterable, and which samples of a stream a rank sees depends on "
            "the number of ranks. Return a map-style data set (`__len__`, `__getitem__`)"
        )
    position, places = int(place.get("position", 0)), saved_places(place, data.streams)
    opened = {dealing.first_stream: opener.share(dealing.first_stream, dataset)}

    def make_stream(stream: int) -> Stream:
        return Stream(
            opener,
            stream,
            resume=data.resume,
            count=samples_used(position, stream, data.streams),
            place=places[stream],
            opened=opened.get(stream),
            stop_requested=stop_requested,
        )

    source = StreamSource(
        dealing,
        make_stream,
        start_step=start_step,
        start_position=position,
        gather=gather,
    )
    source.check_state()
    return source, _data_lines(config, rank.world_size, sum(saved.offset for saved in places))


def first_sample(config: RunConfig) -> Any:
    """One sample of data.train, of a data set that is then let go. Raises UsageError for an empty one."""
    dataset, _ = _build(config, config.data.train, "data.train", 0)
    if not _is_iterable(dataset):
        _check_map_style(config, dataset)
        return dataset[0]
    for sample in dataset:
        return sample
    raise UsageError("data.train: the data set is empty")


def _map_source(
    config: RunConfig, rank: DataRank, dataset: Any, start_step: int, place: Mapping[str, Any]
) -> tuple[Source, list[str]]:
    num_samples = _check_map_style(config, dataset)
    if "streams" in place:
        raise UsageError("data.train: the checkpoint was saved with an iterable data set, and this one is map-style")

    def plan_for(part: int, num_parts: int) -> BatchPlan:
        return BatchPlan(
            num_samples,
            batch_size=config.data.batch_size,
            seed=config.train.seed,
            shuffle=config.data.shuffle,
            rank=part,
            world_size=num_parts,
            micro_batch=config.train.micro_batch,
            start_step=start_step,
            start_position=int(place.get("position", 0)),
        )

    plan: Plan = plan_for(rank.rank, rank.world_size)
    if config.train.exact:
        shards = LogicalShards(num=config.train.exact.shards, rank=rank.rank, world_size=rank.world_size)
        plan = ShardPlan([plan_for(shard, shards.num) for shard in shards.mine], shards.most)
    steps = config.train.steps
    epochs = steps * config.data.batch_size / num_samples
    source = MapSource(dataset, plan, seed=config.train.seed, key="data.train")
    return source, [f"data      {num_samples:,} samples, {steps} steps = {epochs:.2f} epochs"]


def evaluation_source(
    config: RunConfig, rank: DataRank, stop_requested: Callable[[], bool]
) -> Callable[[], Source] | None:
    """Makes what one evaluation reads: every sample of data.eval once. None where there is nothing to evaluate on.
    Raises UsageError now, not after hours."""
    if config.data.eval is None:
        return None
    dealing = _dealing(config, rank)
    dataset, opener = _build(config, config.data.eval, "data.eval", dealing.first_stream)
    if _is_iterable(dataset):
        return _stream_passes(opener, dataset, dealing, stop_requested)
    plan = PassPlan(
        check_dataset(dataset, "data.eval"),
        batch_size=config.data.batch_size,
        rank=rank.rank,
        world_size=rank.world_size,
        micro_batch=config.train.micro_batch,
    )
    return lambda: MapSource(dataset, plan, seed=config.train.seed, num_steps=plan.num_steps, key="data.eval")


def _stream_passes(
    opener: Opener, dataset: Any, dealing: Dealing, stop_requested: Callable[[], bool]
) -> Callable[[], Source]:
    mine = streams_of(dealing.rank, dealing.world_size, dealing.num_streams)
    # One sample, of a data set that is then let go: what does not work shows now.
    Stream(opener, mine[0], opened=opener.share(mine[0], dataset), stop_requested=stop_requested).read_pass()
    # Opened here, so that no evaluation has to do it again; what is its own iterator is used up by one.
    opened = {s: found for s in mine if not isinstance((found := opener(s))[0], Iterator)}

    def make_stream(stream: int) -> Stream:
        return Stream(opener, stream, opened=opened.get(stream), stop_requested=stop_requested)

    return lambda: StreamPass(dealing, make_stream, opener.key)


def _check_map_style(config: RunConfig, dataset: Any) -> int:
    """The number of samples. Raises UsageError for keys that belong to iterable data sets."""
    data = config.data
    for key, asked in (("streams", data.streams > 1 and data.eval is None), ("resume", data.resume != "state")):
        if asked:
            name = type(dataset).__name__
            raise UsageError(f"data.{key} belongs to iterable data sets, and {name} is map-style. Leave it out")
    return check_dataset(dataset, "data.train")


def _is_iterable(dataset: Any) -> bool:
    """Torch's IterableDataset has a __getitem__ that only raises."""
    map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return isinstance(dataset, IterableDataset) or (hasattr(dataset, "__iter__") and not map_style)


def _build(config: RunConfig, target: Target, key: str, stream: int) -> tuple[Any, Opener]:
    """The data set (of `stream`, where it takes one), and what makes it once more for each stream. It may draw random
    numbers to build itself (a split): the same ones in every layout and attempt."""

    def build(**more: int) -> Any:
        seed_everything(config.train.seed, 0xDA7A)
        return targets.build(target, more=more)

    takes_stream = targets.takes(target, STREAM_KEYWORDS)
    opener = Opener(
        build=build, num_streams=config.data.streams, takes_stream=takes_stream, seed=config.train.seed, key=key
    )
    return (build(stream=stream, num_streams=config.data.streams) if takes_stream else build()), opener


def _dealing(config: RunConfig, rank: DataRank) -> Dealing:
    return Dealing(
        num_streams=config.data.streams,
        batch_size=config.data.batch_size,
        micro_batch=config.train.micro_batch,
        rank=rank.rank,
        world_size=rank.world_size,
    )


def _data_lines(config: RunConfig, world_size: int, used: int) -> list[str]:
    """What a person should know of an iterable data set: its length is not known. `used`: samples of the epochs that
    the checkpoint is in."""
    streams, resume = config.data.streams, config.data.resume
    together = world_size // num_classes(world_size, streams)  # ranks that read the same streams
    each = f", {streams // world_size} a rank" if together == 1 and world_size > 1 else ""
    lines = [f"data      iterable, {streams} {'stream' if streams == 1 else 'streams'}{each}"]
    if together > 1:
        fitting = world_size * -(-streams // world_size)
        lines.append(
            f"note      {together} ranks read the same samples and each keeps one in {together}; "
            f"a run with data.streams: {fitting} would read each once"
        )
    if config.data.workers > 1:
        lines.append(f"note      one loader process a rank reads an iterable: data.workers is {config.data.workers}")
    if resume == "skip":
        now = f"; now {used:,} of them" if used else ""
        lines.append(f"note      data.resume: skip: what an epoch has used is read again after an interruption{now}")
    if resume == "restart":
        now = f"; now {used:,} samples come again" if used else ""
        lines.append(f"note      data.resume: restart: after an interruption each stream begins its epoch again{now}")
    return lines
