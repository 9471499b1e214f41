"""What `strategy.pipeline` asks of the other sections, found before anything starts. Where a model can be cut only the
model tells: strategies/pipeline.py asks it on the nodes.
"""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.runtime.config import DataConfig, Target, TrainConfig
from dtrain.runtime.shares import num_micro_batches
from dtrain.strategies.config import StrategyConfig
from dtrain.strategies.layout import check_layout, degrees_of
from dtrain.strategies.pipelinesplit import refused_micro_batches, stages_a_rank

Found = Iterator[tuple[str, str]]  # key, message

_LEFT_OUT = StrategyConfig()
_OWN_KEYS = ("pipeline_schedule", "pipeline_split", "pipeline_stages")


def check_pipeline(
    strategy: StrategyConfig, train: TrainConfig, data: DataConfig, nodes: int, procs_per_node: int
) -> Found:
    if strategy.pipeline == 1:
        for key in _OWN_KEYS:
            if getattr(strategy, key) != getattr(_LEFT_OUT, key):
                yield (
                    f"strategy.{key}",
                    "belongs to a pipeline, and strategy.pipeline is 1. Leave it out, or set pipeline.",
                )
        return
    if data.forward is not None:
        yield (
            "data.forward",
            "does not go with strategy.pipeline: a rank has only a part of the model. Leave one of the two out.",
        )
    yield from _stages(strategy)
    if not check_layout(strategy, nodes, procs_per_node):
        yield from _micro_batches(strategy, train, data, degrees_of(strategy, nodes * procs_per_node).data)


def check_callables(strategy: StrategyConfig, loss_closure: Target | None, on_end: Target | None) -> Found:
    """The user's callables that get the model itself."""
    if strategy.pipeline == 1:
        return
    for key, target in (("loss_closure", loss_closure), ("on_end", on_end)):
        if target is not None:
            yield (
                key,
                "gets the model to call, and with strategy.pipeline a rank has a part of it. Leave one of the two out"
                + (": set loss, a callable(output, batch)." if key == "loss_closure" else "."),
            )


def _stages(strategy: StrategyConfig) -> Found:
    each = stages_a_rank(strategy.pipeline_schedule, strategy.pipeline_stages)
    if strategy.pipeline_schedule == "interleaved" and each < 2:
        yield "strategy.pipeline_stages", "interleaved has 2 stages a rank or more. Leave it out, or take 1f1b."
    if strategy.pipeline_schedule != "interleaved" and each > 1:
        schedule = strategy.pipeline_schedule
        yield "strategy.pipeline_stages", f"{schedule} has one stage a rank. Leave it out, or take interleaved."
    num_stages, given = strategy.pipeline * each, len(strategy.pipeline_split)
    if given and given != num_stages - 1:
        yield (
            "strategy.pipeline_split",
            f"pipeline {strategy.pipeline} x {each} a rank = {num_stages} stages, and it names the first unit of all "
            f"but the first stage, so {num_stages - 1}; found {given}. Name so many, or leave it out.",
        )


def _micro_batches(strategy: StrategyConfig, train: TrainConfig, data: DataConfig, data_ranks: int) -> Found:
    def refused(size: int | None) -> str:
        number = num_micro_batches(data.batch_size, data_ranks, size)
        return refused_micro_batches(strategy.pipeline_schedule, strategy.pipeline, number)

    problem = refused(train.micro_batch)
    if not problem:
        return
    largest = -(-data.batch_size // data_ranks)
    number = num_micro_batches(data.batch_size, data_ranks, train.micro_batch)
    equal = -(-largest // strategy.pipeline)  # as many parts as ranks, and as equal as can be
    sizes = (*range(equal, 0, -1), *range(largest, equal, -1))
    fitting = next((size for size in sizes if not refused(size)), None)
    way = f"Set {fitting} or fewer" if strategy.pipeline_schedule == "1f1b" else f"Set {fitting}"
    yield (
        "train.micro_batch",
        f"{problem}, and {largest} samples a rank in parts of {train.micro_batch or largest} are {number}. "
        + (f"{way}, or take pipeline_schedule: gpipe." if fitting else "Set a larger data.batch_size."),
    )
